"""The module was built in this guest for its kernels, and media goes through the kernel: by every sign there is."""

import http.client
import json
import re
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from guests import inventory_of

from voip_stack import inventory, lab
from voip_stack.calls.probes import parse_metrics

INTERNAL = inventory_of("rtpengine-1")["internal_address"]
EXTERNAL = inventory_of("rtpengine-1")["external_address"]
PHONE = str(inventory.load().phones[-1])
PBX = str(inventory.load().networks["internal"].computer)
RTP = Path(__file__).with_name("rtp.py")
SECONDS = 10  # of media: the daemon hands a stream to the kernel about 3 s after its first packet
PACKETS = SECONDS * 50


def ng(command, **values):
    """An answer of the ng protocol, which takes JSON in place of bencode.

    https://rtpengine.readthedocs.io/en/latest/ng_control_protocol.html
    """
    cookie = uuid.uuid4().hex
    with lab.current().open_socket(socket.SOCK_DGRAM) as control:
        control.settimeout(10)
        control.connect((INTERNAL, 2223))
        control.send(f"{cookie} {json.dumps({'command': command, **values})}".encode())
        said, _, answer = control.recv(65535).decode().partition(" ")
    assert said == cookie
    return json.loads(answer)


def sdp(address, port):
    lines = ["v=0", f"o=- 1 1 IN IP4 {address}", "s=-", f"c=IN IP4 {address}", "t=0 0", f"m=audio {port} RTP/AVP 0"]
    return "\r\n".join([*lines, "a=sendrecv", ""])


def media_of(text):
    """Where an SDP says that media goes to."""
    address = re.search(r"c=IN IP4 (\S+)", text).group(1)
    return address, re.search(r"m=audio (\d+)", text).group(1)


def metrics():
    page = http.client.HTTPConnection(INTERNAL, 2225)
    page.sock = lab.current().connect(INTERNAL, 2225, timeout=10)
    page.request("GET", "/metrics")
    return parse_metrics(page.getresponse().read().decode())


def table(host):
    """Packets that the kernel has forwarded, by entry of its table (which names the local port)."""
    text = host.check_output("cat /proc/rtpengine/0/list")
    entries = re.split(r"^local inet4 ", text, flags=re.MULTILINE)[1:]
    return {e.split()[0]: sum(map(int, re.findall(r"stats: .*?(\d+) packets", e))) for e in entries}


@pytest.fixture(scope="module")
def kernels(host):
    """The running kernel, and the other one."""
    return host.check_output("uname -r"), sorted(host.check_output("ls /boot | sed -n s/^vmlinuz-//p").split())


def test_dkms_has_built_the_module_for_every_kernel(host, kernels):
    running, installed = kernels
    assert running in installed
    assert len(installed) > 1, "the scenario has installed a second one"
    built = {line.split(", ")[1] for line in host.check_output("dkms status").splitlines() if ": installed" in line}
    assert built == set(installed)


def test_the_module_that_runs_was_built_here(host, kernels):
    """It is the file that DKMS has put there, of which this guest has the build's log, and no package's."""
    name = host.check_output("sed -n 's/ .*//p' /proc/modules | grep -iE '^(xt|nft)_rtpengine$'")
    file = host.check_output("modinfo --field filename %s", name)
    assert f"/lib/modules/{kernels[0]}/updates/dkms/{name}.ko" in file
    assert host.run("dpkg --search %s", file).rc != 0, "a package brought it"
    assert host.check_output("find /var/lib/dkms/rtpengine -path %s", f"*/{kernels[0]}/*/log/make.log")
    same = """
import lzma, pathlib, sys
note = pathlib.Path("/sys/module", sys.argv[1], "notes/.note.gnu.build-id").read_bytes()
sys.exit(note not in lzma.open(sys.argv[2]).read())
"""
    assert host.run("python3 -c %s %s %s", same, name, file).rc == 0, "the module in memory is another one"


@pytest.fixture(scope="module")
def call(host):
    """A session with media both ways, from outside and from inside, watched until its end."""
    names = {"call-id": uuid.uuid4().hex, "from-tag": "a"}
    flags = {"replace": ["origin", "session-connection"], "ICE": "remove"}
    since = host.check_output("date +%s")
    # The side that a message comes from is named first.
    offer = ng("offer", sdp=sdp(PHONE, 6000), direction=["external", "internal"], **names, **flags)
    assert offer["result"] == "ok", offer
    names["to-tag"] = "b"
    answer = ng("answer", sdp=sdp(PBX, 7000), direction=["internal", "external"], **names, **flags)
    assert answer["result"] == "ok", answer
    seen = {"inside": media_of(offer["sdp"]), "outside": media_of(answer["sdp"])}
    ends = {
        "outside": lab.current().outside("python3", str(RTP), PHONE, "6000", *seen["outside"], str(SECONDS)),
        "inside": lab.current().inside("python3", str(RTP), PBX, "7000", *seen["inside"], str(SECONDS)),
    }
    running = {end: subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for end, argv in ends.items()}
    try:
        time.sleep(5)
        seen["metrics"], seen["table"] = [metrics()], [table(host)]
        seen["query"] = ng("query", **names)
        time.sleep(2)
        seen["metrics"].append(metrics())
        seen["table"].append(table(host))
        seen["counts"] = {end: json.loads(process.communicate(timeout=60)[0]) for end, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    seen["journal"] = host.check_output("journalctl --no-pager -o cat -u rtpengine-daemon --since @%s", since)
    seen["delete"] = ng("delete", **names)
    return seen


def test_each_side_is_told_the_address_of_its_own_network(call):
    assert call["outside"][0] == EXTERNAL
    assert call["inside"][0] == INTERNAL


def test_all_packets_arrive_both_ways(call):
    for end in ("outside", "inside"):
        assert call["counts"][end]["sent"] == PACKETS
        assert call["counts"][end]["received"] >= 0.98 * PACKETS, end


def test_the_kernel_forwards_both_streams(call):
    before, after = call["metrics"]
    assert after.kernel_streams == 2
    kernel = after.kernel_packets - before.kernel_packets
    userspace = after.userspace_packets - before.userspace_packets
    assert kernel >= 100, "two streams of 50 packets a second, for two seconds at least"
    assert userspace <= 0.1 * kernel


def test_the_modules_own_table_counts_them(call):
    before, after = call["table"]
    assert {f"{address}:{port}" for address, port in (call["outside"], call["inside"])} <= set(after)
    for entry in (f"{address}:{port}" for address, port in (call["outside"], call["inside"])):
        assert after[entry] > before[entry] + 50, entry


def test_ng_says_that_the_streams_are_in_the_kernel(call):
    streams = [s for tag in call["query"]["tags"].values() for m in tag["medias"] for s in m["streams"]]
    media = [s for s in streams if "RTP" in s["flags"] and "RTCP" not in s["flags"]] or streams
    kernelized = [s for s in media if "kernelized" in s["flags"]]
    assert len(kernelized) == 2, media
    assert all(s["last kernel packet"] > 0 for s in kernelized)


def test_the_rule_and_the_journal_agree(host, call):
    assert host.run("rtpengine --config-file=/etc/rtpengine/rtpengine.conf --nftables-status").rc == 0
    assert call["journal"].count("Kernelizing media stream") >= 2


def test_a_released_session_leaves_nothing(host, call):
    assert call["delete"]["result"] == "ok"
    assert metrics().sessions == 0
    assert table(host) == {}


def test_control_listens_inside_only(host):
    found = set(host.check_output("ss -Hlntu 'sport = :2223 or sport = :2224 or sport = :2225'").split())
    found = {word for word in found if re.search(r":222[345]$", word)}
    assert found == {f"{INTERNAL}:2223", f"{INTERNAL}:2225", "127.0.0.1:2224"}


def test_an_option_that_it_does_not_know_never_reaches_it(host):
    host.check_output("{ cat /etc/rtpengine/rtpengine.conf; echo no-such-option = 1; } >/tmp/bad.conf")
    done = host.run("rtpengine-try-config /tmp/bad.conf")
    assert done.rc != 0
    assert "no-such-option" in done.stderr


def test_the_options_of_the_variables_are_in_force():
    """50 sessions at most: the fifty-first is refused (one that is answered counts)."""
    ids = [uuid.uuid4().hex for _ in range(51)]
    results = [
        ng("offer", sdp=sdp(PHONE, 6000), direction=["external", "internal"], **{"call-id": i, "from-tag": "a"})
        for i in ids
    ]
    for i in ids:
        ng("delete", **{"call-id": i, "from-tag": "a"})
    assert [r["result"] for r in results[:50]] == ["ok"] * 50
    assert results[50]["result"] != "ok"
