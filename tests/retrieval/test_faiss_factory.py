"""Which kind of index fits a number of vectors."""

from retro_engine.retrieval.faiss_factory import clamp_lists, factory_for, num_lists


def test_the_kind_of_index_follows_the_size() -> None:
    table = {
        1: "Flat",
        49_999: "Flat",
        50_000: "IVF1024,Flat",
        999_999: "IVF4096,Flat",
        10**6: "IVF16384,SQ8",
        10**7: "IVF65536_HNSW32,PQ48",
        3 * 10**8: "IVF131072_HNSW32,PQ48",
        10**9: "IVF262144_HNSW32,PQ48",
    }
    for size, factory in table.items():
        assert factory_for(size, 384) == factory
        assert num_lists(factory) <= max(1, size // 39) or size < 50
    assert factory_for(10**8, 100).endswith("PQ10"), "the number of subquantizers divides the width"
    assert clamp_lists("OPQ8,IVF1024_HNSW32,PQ8", 3900) == "OPQ8,IVF100_HNSW32,PQ8"
    assert clamp_lists("IVF8,Flat", 10) == "IVF1,Flat"
