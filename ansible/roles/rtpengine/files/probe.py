"""Prove that RTPEngine works: it answers a ping, its kernel table and rules exist, and Redis takes its password.

probe.py ADDRESS PORT TABLE REDIS-ADDRESS REDIS-PORT; no Redis when its address is empty.
"""

import pathlib
import socket
import subprocess
import sys

address, port, table = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
redis, redis_port = sys.argv[4], int(sys.argv[5])
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
if redis:
    # Not a look at RTPEngine's own connection: it makes one when a call needs it.
    password = pathlib.Path("/etc/rtpengine/secrets.env").read_text().strip().partition("=")[2]
    try:
        with socket.create_connection((redis, redis_port), timeout=5) as connection:
            connection.sendall(f"AUTH {password}\r\n".encode())
            said = connection.recv(4096).decode().strip()
    except OSError as error:
        sys.exit(f"Redis, where sessions are kept, does not answer on {redis}:{redis_port}: {error}")
    if said != "+OK":
        sys.exit(f"Redis on {redis}:{redis_port} refuses RTPEngine, its user default: {said}")
