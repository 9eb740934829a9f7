"""Train a small network under PyTorch's DDP: checkpointed, resumed, and the same for any number of processes.

    python train.py                                      one process
    torchrun --standalone --nproc-per-node=4 train.py    four: the same model, to rounding

It runs on GPUs where there is one for each process (nccl), else on the CPU (gloo). Started again, by whatever means, it
goes on from its last checkpoint. A warning that time is up (SIGTERM, SIGUSR1 or SIGUSR2, to any process, any number of
times) makes it save a checkpoint after the step that it is in, and exit with code 143: not done, but nothing is wrong.
For `--max-restarts`, torchrun itself wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; Nexa Infra sets it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

FEATURES, CLASSES, SEEN, UNSEEN = 32, 10, 4096, 1024
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}  # bf16: by autocast

# torchrun says the first two, Nexa Infra the others; without it, files go to the current folder.
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CHECKPOINTS = Path(os.environ.get("NEXA_CHECKPOINT_DIR", "checkpoints"))
MODEL = Path(os.environ.get("NEXA_TRIAL_DIR", ".")) / "model.pt"
METRICS, METRICS_LOG = os.environ.get("NEXA_METRICS"), os.environ.get("NEXA_METRICS_LOG")

warned: set[int] = set()  # the signals that have come to this process


def read_arguments() -> argparse.Namespace:
    """Read the arguments; the batch is that of all processes together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="a checkpoint is saved after each")
    parser.add_argument("--steps-per-epoch", "--steps_per_epoch", type=int, default=10)
    parser.add_argument("--batch-size", "--batch_size", type=int, default=256, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.05, help="the step of SGD")
    parser.add_argument("--hidden", type=int, default=64, help="neurons in each of the two hidden layers")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the first weights and the order")
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="bf16 is autocast, for GPUs")
    parser.add_argument("--checkpoint-steps", "--checkpoint_steps", type=int, default=0, help="save every N steps too")
    parser.add_argument("--step-seconds", "--step_seconds", type=float, default=0.0, help="make a step last longer")
    arguments = parser.parse_args()
    if arguments.batch_size % WORLD:
        parser.error(f"--batch-size {arguments.batch_size} cannot be split evenly over {WORLD} processes")
    return arguments


def heed(*signals: signal.Signals) -> None:
    """Note from now on that these signals have come, and go on."""
    for number in signals:
        signal.signal(number, lambda signum, _: warned.add(signum))


def start() -> torch.device:
    """Say who and where this process is, join the others, and make sums come out the same on every run."""
    heed(signal.SIGUSR1, signal.SIGUSR2)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(f"node {host} pid {os.getpid()} rank {RANK} of {WORLD}", flush=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks of cuBLAS
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if WORLD > 1:
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    return device


def make_data(seed: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the samples, and their classes by a rule that can be learned: the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    samples = torch.randn(SEEN + UNSEEN, FEATURES, generator=random, dtype=torch.float64)
    rule = torch.randn(FEATURES, CLASSES, generator=random, dtype=torch.float64)
    return samples.to(device, dtype), (samples @ rule).argmax(dim=1).to(device)


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file whole: a kill at any instant leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def append(path: Path, content: bytes) -> None:
    """Add to a file."""
    with path.open("ab") as stream:
        stream.write(content)


class Training:
    """A network on its way: what a checkpoint holds, and what a step does."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.total = arguments.epochs * arguments.steps_per_epoch
        self.step = self.began = 0
        dtype = DTYPES[arguments.dtype]
        self.samples, self.classes = make_data(arguments.seed, dtype, device)
        torch.manual_seed(arguments.seed)
        width = arguments.hidden
        self.network = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        ).to(device, dtype)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=arguments.lr, momentum=0.9)
        self.order = torch.Generator().manual_seed(arguments.seed)
        self.resume()
        self.model = nn.parallel.DistributedDataParallel(self.network) if WORLD > 1 else self.network

    def resume(self) -> None:
        """Take up the last checkpoint; rank 0 reads it for all, as another node may still see an older file."""
        path = CHECKPOINTS / "last.pt"
        shared = [path.read_bytes() if RANK == 0 and path.exists() else b""]
        if WORLD > 1:
            distributed.broadcast_object_list(shared, src=0, device=self.device)
        if shared[0]:
            state = torch.load(io.BytesIO(shared[0]), map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.order.set_state(state["order"])
            self.step = self.began = state["step"]

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
        }
        if RANK == 0:
            write(CHECKPOINTS / "last.pt", lambda stream: torch.save(state, stream))

    def take_step(self) -> tuple[float, bool]:
        """Train on one batch; return its loss, and whether any process has been warned."""
        time.sleep(self.arguments.step_seconds)
        share = self.arguments.batch_size // WORLD
        # Every rank draws the whole batch and takes its share: so the batches are the same for any number of ranks.
        batch = torch.randint(SEEN, (self.arguments.batch_size,), generator=self.order)[RANK * share :][:share]
        batch = batch.to(self.device)
        bf16 = self.arguments.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = cross_entropy(self.model(self.samples[batch]), self.classes[batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if RANK == 0:
            append(CHECKPOINTS / "executed", b".")
        # One sum tells the loss and the warnings: all ranks see the same, and so stop after the same step.
        told = torch.stack([loss.detach().double() / WORLD, loss.new_tensor(len(warned), dtype=torch.float64)])
        if WORLD > 1:
            distributed.all_reduce(told)
        return float(told[0]), bool(told[1])

    def measure(self) -> dict[str, float]:
        """Measure loss and accuracy on samples that the network has not seen."""
        with torch.no_grad():
            guesses, classes = self.network(self.samples[SEEN:]), self.classes[SEEN:]
            return {
                "loss": float(cross_entropy(guesses, classes)),
                "accuracy": float((guesses.argmax(dim=1) == classes).double().mean()),
                "steps": self.step,
            }

    def story(self) -> str:
        """Say where this start began, and what all starts together have done, the steps that a kill lost among them."""
        executed = CHECKPOINTS / "executed"
        count = executed.stat().st_size if executed.exists() else 0
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return (
            f"attempt {os.environ.get('NEXA_ATTEMPT', '1')} {'resumed' if self.began else 'started'} "
            f"at step {self.began} of {self.total}, steps executed in all {count}"
            + (f" (restart {restart} by torchrun)" if restart else "")
        )


def train(training: Training) -> bool:
    """Take the steps that are left, or those until a warning; return whether all are done."""
    arguments = training.arguments
    while training.step < training.total:
        began = time.monotonic()
        loss, stop = training.take_step()
        step, epoch_ends = training.step, training.step % arguments.steps_per_epoch == 0
        if RANK == 0:
            if METRICS_LOG:
                seconds = time.monotonic() - began
                line = {"step": step, "total_steps": training.total, "loss": loss, "lr": arguments.lr}
                append(Path(METRICS_LOG), json.dumps({**line, "seconds": seconds}).encode() + b"\n")
            if epoch_ends:
                print(f"epoch {step // arguments.steps_per_epoch} of {arguments.epochs}: loss {loss:.4f}", flush=True)
        if stop or epoch_ends or (arguments.checkpoint_steps and step % arguments.checkpoint_steps == 0):
            training.save()
        if stop and step < training.total:
            return False
    return True


def main() -> int:
    """Train to the end, or to a warning; return the exit code."""
    arguments = read_arguments()
    training = Training(arguments, start())
    if RANK == 0:
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        if training.began:
            print(training.story(), flush=True)
    heed(signal.SIGTERM)  # until here there was nothing to save, and a start that waits for the others must end by it
    done = train(training)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what comes now could only spoil an end
    if RANK == 0 and done:
        metrics = training.measure()
        write(MODEL, lambda stream: torch.save(training.network.state_dict(), stream))
        if METRICS:
            write(Path(METRICS), lambda stream: stream.write(json.dumps(metrics).encode()))
        print(training.story(), json.dumps(metrics), sep="\n", flush=True)
    elif RANK == 0:
        print(f"warned that time is up: step {training.step} of {training.total} is saved", flush=True)
    if WORLD > 1:
        distributed.barrier()  # the first process to exit ends the others: not before rank 0 has written
        del training.model  # DDP goes before the group: what it holds of a group that has ended can lock up the exit
        distributed.destroy_process_group()
    return 0 if done else 143


if __name__ == "__main__":
    sys.exit(main())
