"""Functions run in several processes that can exchange tensors."""

import multiprocessing
import os
import pickle
import socket
import traceback
from pathlib import Path

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.training.processes", "sae_lens_atm.training.run"])


def run_on(ranks, function, *arguments, lost=()):
    """Call a function in several processes, and return the results by rank.

    Args:
        ranks: number of processes.
        function: a function of a module.
        arguments: its arguments.
        lost: ranks that end without a result.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = SERVER.Queue()
    places = [(rank, ranks, port, str(Path.cwd())) for rank in range(ranks)]
    processes = [
        SERVER.Process(target=_child, args=(place, answers, function, arguments))
        for place in places
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in range(ranks - len(lost)))
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "it does not end"
    errors = [answer for answer in found.values() if isinstance(answer, str)]
    assert not errors, errors[0]
    return {rank: pickle.loads(answer) for rank, answer in found.items()}


def _child(place, answers, function, arguments):
    rank, ranks, port, folder = place
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        answers.put((rank, pickle.dumps(function(*arguments))))
    except BaseException:
        answers.put((rank, traceback.format_exc()))
    answers.close()
    answers.join_thread()
