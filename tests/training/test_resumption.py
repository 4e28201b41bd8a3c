"""Checkpoints that are incomplete, failures while one is written, and optimiser states across the border of FSDP2."""

import logging

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from mone.training.resumption import (
    describe_last_checkpoint,
    last_complete_checkpoint,
    load_optimizer,
    writing_checkpoint,
)


def make_checkpoint(folder, step, state='{"global_step": 1}'):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return str(checkpoint)


def test_the_newest_complete_checkpoint_by_its_number(tmp_path, caplog):
    make_checkpoint(tmp_path, 9)
    complete = make_checkpoint(tmp_path, 10)
    without = make_checkpoint(tmp_path, 100, state=None)
    half = make_checkpoint(tmp_path, 50, state='{"global_step": 5')
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == complete
    assert without in caplog.text and half in caplog.text
    assert complete in describe_last_checkpoint(tmp_path)


def test_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 5, state=None)
    assert last_complete_checkpoint(tmp_path) is None
    assert "from the beginning" in describe_last_checkpoint(tmp_path)


def test_a_failure_while_writing_leaves_the_older_one(tmp_path):
    older, folder = make_checkpoint(tmp_path, 3), tmp_path / "checkpoint-6"
    message = r"checkpoint-6 could not be written: no pen.* MiB were free.*checkpoint-3"
    with pytest.raises(OSError, match=message), writing_checkpoint(folder, is_main_process=True):
        make_checkpoint(tmp_path, 6, state=None)
        raise RuntimeError("no pen")
    assert not folder.exists()
    assert last_complete_checkpoint(tmp_path) == older


def test_what_is_written_again_is_incomplete_until_its_end(tmp_path):
    """A kill at any time in between must not leave the old mark of completeness on new files."""
    folder = tmp_path / "checkpoint-6"
    make_checkpoint(tmp_path, 6)
    with writing_checkpoint(folder, is_main_process=True):
        assert last_complete_checkpoint(tmp_path) is None
        (folder / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(folder)


def trained(steps):
    """A model and its optimiser, with groups in another order than the parameters, after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [
        {"params": [model[1].weight, model[0].bias], "weight_decay": 0.1},
        {"params": [model[0].weight, model[1].bias], "lr": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("of_fsdp", [True, False])
def test_an_optimizer_state_by_name_or_by_number(tmp_path, of_fsdp):
    model, optimizer = trained(3)
    if of_fsdp:
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        assert "0.bias" in state["state"]
        torch.save(state, tmp_path / "optimizer.bin")
    else:
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = optimizer.state_dict()
    fresh, other = trained(0)
    load_optimizer(tmp_path, fresh, other)
    loaded = other.state_dict()
    for actual, group in zip(loaded["param_groups"], expected["param_groups"], strict=True):
        for name in ("lr", "weight_decay", "eps"):
            assert actual[name] == group[name]
    for number, entries in expected["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(loaded["state"][number][name], value, atol=0, rtol=0)
    for mine, theirs in zip(fresh.parameters(), trained(0)[0].parameters(), strict=True):
        assert torch.equal(mine, theirs), "loading a state takes no step"
