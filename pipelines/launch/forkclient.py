"""What kfp starts instead of `python3` for a step: ask the fork server, wait, end as the step ended.

Run as a script with `python -I -S` and written to import almost nothing: it is the price of every step.
"""

import os
import sys
from _socket import AF_UNIX, SHUT_WR, SOCK_STREAM, socket


def main() -> int:
    """Exit status of the step; without an answering server the step runs in this very process."""
    address, python, *arguments = sys.argv[1:]
    connection = socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.connect(address)
    except OSError:
        os.execv(python, [python, *arguments])
    environment = [key + b"=" + value for key, value in os.environb.items()]
    words = [os.fsencode(word) for word in arguments]
    try:
        connection.sendall(b"\0".join([os.fsencode(os.getcwd()), b"%d" % len(words), *words, *environment]))
        connection.shutdown(SHUT_WR)
        answer = connection.recv(16)
    except OSError:
        answer = b""
    if not answer:
        sys.stderr.write("the fork server ended while the step ran\n")
    return int(answer or b"1")


sys.exit(main())
