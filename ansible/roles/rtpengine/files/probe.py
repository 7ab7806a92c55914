"""Prove that RTPEngine works (probe.py ADDRESS PORT TABLE): it answers a ping, its kernel table and rules exist."""

import pathlib
import socket
import subprocess
import sys

address, port, table = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ng:
    ng.settimeout(5)
    ng.connect((address, port))
    try:
        ng.send(b"1 d7:command4:pinge")
        answer = ng.recv(4096)
    except OSError as error:
        sys.exit(f"RTPEngine does not answer on {address}:{port}/udp (ng): {error}")
if answer != b"1 d6:result4:ponge":
    sys.exit(f"RTPEngine answers a ping on {address}:{port}/udp with {answer!r}")
if table >= 0:
    if not pathlib.Path(f"/proc/rtpengine/{table}/status").exists():
        sys.exit(f"the kernel has no table {table}: media would pass through user space (lsmod | grep -i rtpengine)")
    rules = subprocess.run(["rtpengine", "--nftables-status"], capture_output=True, text=True, check=False)
    if rules.returncode != 0:
        sys.exit(f"RTPEngine's rules are not in nftables: {(rules.stderr or rules.stdout).strip()}")
