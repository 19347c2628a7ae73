//! Ports of the host that lead into a guest on QEMU's user-mode network, added and removed while it runs.
//!
//! They are never on the command line: a port has one owner at a time, and a QEMU that is started beside the one it is to replace
//! must not need what that one has. QEMU knows them only through its monitor for people, whose words are read here.

use std::net::Ipv4Addr;

use serde_json::json;

use crate::qmp::{Qmp, QmpError};

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostForward {
    /// UDP; else TCP.
    pub udp: bool,
    /// Address of the host.
    pub address: Ipv4Addr,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

impl HostForward {
    /// The host's side in QEMU's words.
    fn outside(&self) -> String {
        format!("{}:{}:{}", if self.udp { "udp" } else { "tcp" }, self.address, self.host)
    }
}

/// Has a port of the host lead to the card `card`.
pub fn add(qmp: &Qmp, card: &str, forward: &HostForward) -> Result<(), QmpError> {
    let line = format!("hostfwd_add {card} {}-:{}", forward.outside(), forward.guest);
    let words = human(qmp, &line)?;
    if words.is_empty() {
        return Ok(());
    }
    Err(QmpError::Refused { command: line, description: words })
}

/// Frees a port.
pub fn remove(qmp: &Qmp, card: &str, forward: &HostForward) -> Result<(), QmpError> {
    let line = format!("hostfwd_remove {card} {}", forward.outside());
    let words = human(qmp, &line)?;
    // "host forwarding rule for tcp:127.0.0.1:2222 removed", "... not found".
    if words.contains("removed") {
        return Ok(());
    }
    Err(QmpError::Refused { command: line, description: words })
}

/// The ports that lead to the card `card`.
pub fn list(qmp: &Qmp, card: &str) -> Result<Vec<HostForward>, QmpError> {
    Ok(parse(&human(qmp, "info usernet")?, card))
}

fn human(qmp: &Qmp, line: &str) -> Result<String, QmpError> {
    let answer = qmp.execute("human-monitor-command", json!({ "command-line": line }))?;
    let words = answer.as_str().ok_or_else(|| QmpError::Answer { command: line.into(), missing: "text" })?;
    Ok(words.trim().to_owned())
}

fn parse(text: &str, card: &str) -> Vec<HostForward> {
    let mut ours = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if !line.starts_with(' ') {
            ours = line.contains(&format!("({card}):"));
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind, _, address, host, _, guest, ..] = words.as_slice() else { continue };
        let Some(protocol) = kind.strip_suffix("[HOST_FORWARD]").filter(|_| ours) else { continue };
        let address = if *address == "*" { Ok(Ipv4Addr::UNSPECIFIED) } else { address.parse() };
        if let (Ok(address), Ok(host), Ok(guest)) = (address, host.parse(), guest.parse()) {
            found.push(HostForward { udp: protocol == "UDP", address, host, guest });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_from_words_for_people() {
        let text = "Hub -1 (other):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  9        127.0.0.1  1111       10.0.2.15    11     0     0\r
Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  13       127.0.0.1  2222       10.0.2.15    22     0     0\r
  TCP[ESTABLISHED]   15       127.0.0.1  2222       10.0.2.15    22     0     0\r
  UDP[HOST_FORWARD]  14               *  5353       10.0.2.15    53     0     0\r\n";
        let tcp = HostForward { udp: false, address: Ipv4Addr::LOCALHOST, host: 2222, guest: 22 };
        let udp = HostForward { udp: true, address: Ipv4Addr::UNSPECIFIED, host: 5353, guest: 53 };
        assert_eq!(parse(text, "net0"), [tcp, udp]);
        assert_eq!(parse(text, "net1"), []);
    }
}
