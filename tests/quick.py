"""A `python` that starts at once: scripts run in forks of a process that has imported torch.

Importing torch takes seconds, and the scripts of runs/ start two dozen processes each. The stand-in
hands its arguments, its folder, its environment and its three streams to a server, and ends with the
exit code of the script.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

PRELOADED = ("sft", "qa_adapter", "golden", "dpo", "caption", "evaluate", "tool_llm")

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(1)
    sys.exit(answer[0] if answer else 70)
"""


def write_client(path, address):
    """The stand-in for python, as an executable file."""
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def start_server(address):
    """Start a server, a process of its own; it listens once its address exists."""
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen([sys.executable, __file__, str(address)], cwd=root)


def serve(address):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.path.insert(0, os.getcwd())
    for name in PRELOADED:
        __import__(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                answer(client)
            client.close()


def answer(client):
    """In a fork: read a request, run its script in another fork, and send the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(client, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(1 << 16)
    pid = os.fork()
    if pid == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        run_script(*json.loads(request))
    _, status = os.waitpid(pid, 0)
    client.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def run_script(argv, folder, env):
    """Run a script as a process of its own would, and end with its exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    streams = [os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")]
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.argv = argv
    sys.path[:2] = [str(Path(argv[0]).resolve().parent)]
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
