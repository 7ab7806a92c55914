"""What common sets is in force: asked of the kernel, systemd, sshd and apt, not of the files."""

from __future__ import annotations

import time

from guests import Host


def test_kernel(host: Host) -> None:
    assert host.sysctl("net.core.rmem_max") == 8388608
    assert host.sysctl("net.core.wmem_max") == 8388608
    assert host.sysctl("vm.swappiness") == 20
    # The ports of group sip, that no outgoing connection may take.
    assert host.sysctl("net.ipv4.ip_local_reserved_ports") == "22,5060-5061"


def test_daemons_may_open_as_many_files(host: Host) -> None:
    pid = host.check_output("systemctl show --value --property MainPID voip-clock")
    assert "Max open files            40000                524288" in host.file(f"/proc/{pid}/limits").content_string


def test_journal_is_bounded(host: Host) -> None:
    said = host.check_output("journalctl --no-pager -o cat --unit systemd-journald --grep 'System Journal' --reverse")
    assert "max 123M" in said.splitlines()[0]


def test_timezone(host: Host) -> None:
    assert host.check_output("date +%Z") in ("WET", "WEST")


def test_names(host: Host) -> None:
    assert host.check_output("hostname") == "common-1"
    assert host.check_output("getent hosts common-1").split()[0] == host.interface("eth0").addresses[0]
    assert host.check_output("getent hosts packages.voip.local").split()[0] == "192.168.64.1"


def test_housekeeping_is_masked(host: Host) -> None:
    for unit in ("apt-daily.timer", "man-db.timer", "systemd-timesyncd.service"):
        assert host.run("systemctl is-enabled %s", unit).stdout.strip() == "masked", unit


def test_sshd_takes_keys_only(host: Host) -> None:
    effective = host.check_output("/usr/sbin/sshd -T").splitlines()
    assert "passwordauthentication no" in effective
    assert "permitrootlogin no" in effective
    assert "authenticationmethods publickey" in effective
    assert "allowusers voip" in effective


def test_clock_follows_the_hypervisors(host: Host) -> None:
    """Set it an hour back: the daemon has it right again within seconds."""
    host.check_output("date --set=@$(($(date +%s) - 3600))")
    end = time.monotonic() + 20
    while time.monotonic() < end and abs(int(host.check_output("date +%s")) - time.time()) > 5:
        time.sleep(1)
    assert abs(int(host.check_output("date +%s")) - time.time()) <= 5


def test_apt_reaches_its_packages(host: Host) -> None:
    assert host.run("apt-get update --error-on=any").rc == 0
    for package in ("jq", "sngrep", "tcpdump"):
        assert host.package(package).is_installed
