"""Forked ranks that exchange over gloo, as those that torchrun starts."""

import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist


def keep_store() -> tuple[int, int]:
    """A process that keeps the ranks' store, as torchrun's does, and the store's port.

    Its threads would make a process that forks ranks unsafe.
    """
    receiving, sending = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(sending, str(store.port).encode())
        signal.pause()
    port = int(os.read(receiving, 10))
    os.close(receiving)
    os.close(sending)
    return keeper, port


def fork_ranks(size: int, action: Callable[[int], Any], log: Path) -> list[tuple[int, str]]:
    """Runs `action(rank)` in so many forked processes; the exit status and error of each."""
    keeper, port = keep_store()
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            status = 1
            try:
                signal.alarm(100)  # ends it
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # as torchrun does
                with (
                    Path(f"{log}-{rank}.out").open("w") as out,
                    Path(f"{log}-{rank}.err").open("w") as err,
                    redirect_stdout(out),
                    redirect_stderr(err),
                ):
                    try:
                        action(rank)
                        status = 0
                    except Exception as error:
                        print(f"{type(error).__name__}: {error}", file=err)
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    return [(status, Path(f"{log}-{rank}.err").read_text()) for rank, status in enumerate(statuses)]
