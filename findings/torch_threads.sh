#!/usr/bin/env bash
# torch 2.14.1: set_num_threads in a thread holds for that thread and for those begun later, not for those that run already.
#
# The documentation says that it sets "the number of threads used for intraop parallelism on CPU", as of one setting of the
# process. It is two: the calling thread's own, and the default that each thread takes over when it first uses torch. A
# worker of a pool (a simulated client, say) that asks for one core changes nothing for a main thread that has computed
# before, which goes on with all, and leaves every thread begun afterwards, elsewhere in the program, with one core.
#
# Seen on CPython 3.11.7, x86-64, OpenMP: after a worker has set 1 where the process had set 4, the main thread and a thread
# that had used torch before have 4, a thread begun afterwards has 1; a setting by the main thread does not reach the worker.
# What helps: set it in an initializer of the pool, and set the usual number again in a thread of its own, as the last one.
#
# Fails (exit status 1) if a setting reaches threads that had used torch before, or not those begun later.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.2

cat > "$folder/compare.py" <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

PROCESS, WORKER, LATER = 4, 1, 3
seen = {}


def ask(words: str, pool: ThreadPoolExecutor | None = None) -> None:
    seen[words] = pool.submit(torch.get_num_threads).result() if pool else torch.get_num_threads()
    print(f"{seen[words]} threads: {words}")


torch.set_num_threads(PROCESS)
with ThreadPoolExecutor(1) as early, ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(1) as late:
    ask("the main thread, at first")
    ask("a thread, at first", early)
    worker.submit(torch.set_num_threads, WORKER).result()
    ask("the worker that has set 1", worker)
    ask("the main thread")
    ask("the thread that asked before", early)
    ask("a thread begun now", late)
    torch.set_num_threads(LATER)
    ask("the worker, after the main thread has set 3", worker)
expected = [PROCESS, PROCESS, WORKER, PROCESS, PROCESS, WORKER, WORKER]
print("as seen" if list(seen.values()) == expected else f"CHANGED: expected {expected}")
sys.exit(list(seen.values()) != expected)
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
