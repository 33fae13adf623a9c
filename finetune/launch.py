"""torchrun, for runs that save a checkpoint when they are told to stop.

Given SIGTERM or Ctrl-C, torchrun passes it on, kills after 30 seconds what still runs, and ends with a traceback. A
step of a large model and its checkpoint take longer, and the training says itself how to go on. (The 30 seconds can be
changed from torch 2.12 on.)

It also divides the cores among the processes, of which torchrun would give each one thread: optimizer states that are
offloaded are updated on the CPU.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import determine_local_world_size, main, parse_args

if __name__ == "__main__":
    os.environ["FINETUNE_LAUNCHER"] = str(os.getpid())  # for guards.die_with_launcher
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    processes = determine_local_world_size(parse_args(sys.argv[1:]).nproc_per_node)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    # Under nohup; torchrun would put its own handler there. Windows has no SIGHUP.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")  # default of its flag
    try:
        main()
    except ChildFailedError as failed:  # which process, with what status; why, it has said itself
        sys.exit(str(failed))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
