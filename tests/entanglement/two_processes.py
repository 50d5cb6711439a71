"""One process of a training on several, started by test_distributed: `python -m tests.entanglement.two_processes KIND FOLDER`."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed

from rlkit2.entanglement.callback import EntanglementWarning
from rlkit2.entanglement.remedy_trainers import with_remedy
from rlkit2.entanglement.trainers import refuse_partial_weights
from rlkit2.errors import ConfigError
from rlkit2.preferences import EntanglementCallback
from tests.entanglement.tiny_trl import gpt2, make_trainer

OPTIONS = {"max_steps": 3, "disable_dropout": True, "per_device_train_batch_size": 2, "logging_steps": 1}


def train(kind, folder, remedy=None, callback=None):
    import trl

    made = with_remedy(trl.DPOTrainer, remedy) if remedy else None
    trainer = make_trainer(kind, folder, [callback] if callback else [], trainer_class=made, **OPTIONS)
    trainer.train()
    state = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everyone = [torch.zeros_like(state) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, state)
    assert all(torch.equal(state, other) for other in everyone), "the processes hold different parameters"
    return state


def main(what, folder):
    if what == "fsdp":
        torch.distributed.init_process_group("gloo")
        from torch.distributed.fsdp import fully_shard

        model = gpt2()
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
        with pytest.raises(ConfigError, match="sharded"):
            refuse_partial_weights(model)
    elif what in ("normalised", "token_mask"):
        plain, changed = train("DPO", folder / "plain"), train("DPO", folder / "remedy", remedy=what)
        assert not torch.equal(plain, changed)
    else:
        callback = EntanglementCallback(every=1, pairs=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", EntanglementWarning)
            states = [train(what, folder / "without"), train(what, folder / "with", callback=callback)]
        assert torch.equal(*states), "the callback changed the training"
        first = torch.distributed.get_rank() == 0
        assert (callback.record is not None) == first
        if first and what != "KTO":
            assert callback.record["trainer_check"]["agree"]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print("fine", flush=True)  # noqa: T201
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
