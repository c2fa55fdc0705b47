"""What the tests of the command line share."""

from retro_engine import cli

TINY = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.init=standard",
    "model.encoder_seq_length=64", "trainer.max_steps=4", "trainer.precision=32", "model.chunk_size=16",
    "model.data.splits_string='70,30,0'", "trainer.val_check_interval=2",
]  # fmt: skip


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])
