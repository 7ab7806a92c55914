"""rtp.py ADDRESS PORT TO-ADDRESS TO-PORT SECONDS: sends 50 packets of G.711 for each second, or until SIGTERM.

On a busy computer some go late, none is left out. Prints how many went and came, and the longest time in seconds
between two that came.

RFC 3550 and 3551: version 2, payload type 0, 160 samples a packet. Runs with nothing but Python.
"""

import json
import signal
import socket
import struct
import sys
import time

address, port, to_address, to_port, seconds = (
    sys.argv[1],
    int(sys.argv[2]),
    sys.argv[3],
    int(sys.argv[4]),
    float(sys.argv[5]),
)
media = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
media.bind((address, port))
media.setblocking(False)
sent = received = 0
totals = [int(seconds * 50)]
signal.signal(signal.SIGTERM, lambda *_: totals.append(0))
begin = last = time.monotonic()
came, gap = None, 0.0
while (now := time.monotonic()) < last + 1 or sent < min(totals):
    if sent < min(totals) and now >= begin + sent * 0.02:
        last = now
        header = struct.pack("!BBHII", 0x80, 0, sent & 0xFFFF, sent * 160, port)
        media.sendto(header + bytes([0xFF]) * 160, (to_address, to_port))
        sent += 1
    try:
        while True:
            received += media.recv(2000)[0] == 0x80
            gap = max(gap, now - (came or now))
            came = now
    except BlockingIOError:
        time.sleep(0.005)
print(json.dumps({"sent": sent, "received": received, "gap": gap}))
