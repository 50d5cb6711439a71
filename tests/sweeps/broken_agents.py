"""Agents whose training ends in every way it can."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

import torch

from rlkit2.agents.bc import BC, BCConfig


@dataclass(frozen=True)
class EndingConfig(BCConfig):
    """Behaviour cloning with an end."""

    ending: str = "none"


class Ending(BC):
    """Behaviour cloning that ends its process, or raises, at update 15, once."""

    config_class = EndingConfig
    config: EndingConfig

    def update(self, batch):
        if int(self.step[0]) == 15 and not os.path.exists(mark := f"{os.environ['RLKIT2_CACHE']}/{self.config.ending}"):
            with open(mark, "w"):
                pass
            sys.stdout.write("about to end\n")
            end(self.config.ending)
        return super().update(batch)


def end(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "memory":
        raise torch.OutOfMemoryError("the GPU is full\nand more lines")
    elif how == "odd":
        raise type("Odd", (BaseException,), {})("neither an Exception nor ours")
