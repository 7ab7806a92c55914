"""rtp.py ADDRESS PORT TO-ADDRESS TO-PORT SECONDS: sends 50 packets of G.711 a second, until then or until SIGTERM.

Prints how many went and came, and the longest time in seconds between two that came.

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
begin = time.monotonic()
ends = [begin + seconds]
signal.signal(signal.SIGTERM, lambda *_: ends.append(time.monotonic()))
came, gap = None, 0.0
while (now := time.monotonic()) < min(ends) + 1:
    if now < min(ends) and now >= begin + sent * 0.02:
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
