"""What a reader says of each passage alone is what the full pass says behind that passage (float64)."""

import torch
from helpers import small_config

from retro_engine.model.encodings import Encodings
from retro_engine.model.passage_choice import absence
from retro_engine.model.retro import RetroModel


def test_absence_is_the_log_probability_behind_each_passage_alone() -> None:
    torch.manual_seed(0)
    model = RetroModel(small_config(reading="prefix", sink_id=3, retrieved_length=7, num_neighbors=2)).double().eval()
    passages, lengths = torch.randint(4, model.config.vocab_size, (3, 7)), torch.tensor([7, 2, 5])
    prompt, absent_id = [9, 8, 7, 6, 5], 11
    found = absence(model, prompt, passages, lengths, absent_id, 0)
    for row, length in enumerate(lengths.tolist()):
        whole = torch.tensor([[3, *passages[row, :length].tolist(), *prompt]])
        said = torch.log_softmax(model(whole)[0, -1].float(), -1)[absent_id]
        torch.testing.assert_close(found[row], said, rtol=1e-6, atol=1e-6)
    kept = absence(model, prompt, passages, lengths, absent_id, 0, Encodings(model, 1 << 20).of)
    assert torch.equal(found, kept)
