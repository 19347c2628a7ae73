//! Ports of the host that lead into a machine.
//!
//! QEMU gets them when it is the machine's one process: a port has one owner, and while a goto loads the new process beside the old
//! one, the old one has it. Should we die in between, recovery opens what is missing.

use std::net::{SocketAddr, SocketAddrV4, TcpListener, UdpSocket};

use qemu::forward::{self, HostForward};
use qemu::qmp::Qmp;

use crate::config::{Forward, Protocol};
use crate::error::{Code, Error, Result};

/// The card that forwards go through.
const CARD: &str = "net0";

/// Sees whether ports can be had, before anything depends on it. `held` are those that a process has which ends first.
pub(crate) fn check_ports(name: &str, wanted: &[Forward], held: &[Forward]) -> Result<()> {
    let taken = |forward: &Forward| {
        held.iter().any(|held| {
            let any = held.address.is_unspecified() || forward.address.is_unspecified();
            let same_address = held.address == forward.address || any;
            held.protocol == forward.protocol && held.host == forward.host && same_address
        })
    };
    for forward in wanted.iter().filter(|forward| !taken(forward)) {
        let address = SocketAddr::V4(SocketAddrV4::new(forward.address, forward.host));
        let tried = match forward.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        tried.map_err(|error| refused(name, forward).because(error))?;
    }
    Ok(())
}

/// Has QEMU open exactly these ports. If one cannot be had, they are what they were.
pub(crate) fn set_ports(qmp: &Qmp, name: &str, wanted: &[Forward]) -> Result<()> {
    let wanted: Vec<HostForward> = wanted.iter().map(host_forward).collect();
    // A machine without a card has no forwards, and one without forwards mostly no need to be asked.
    let open = forward::list(qmp, CARD)?;
    let gone: Vec<&HostForward> = open.iter().filter(|open| !wanted.contains(open)).collect();
    let new: Vec<&HostForward> = wanted.iter().filter(|wanted| !open.contains(wanted)).collect();
    for forward in &gone {
        forward::remove(qmp, CARD, forward)?;
    }
    for (index, forward) in new.iter().enumerate() {
        if let Err(error) = forward::add(qmp, CARD, forward) {
            for added in new.iter().take(index) {
                let _ = forward::remove(qmp, CARD, added);
            }
            for old in &gone {
                let _ = forward::add(qmp, CARD, old);
            }
            return Err(refused(name, &of_host(forward)).because(error));
        }
    }
    Ok(())
}

fn refused(name: &str, forward: &Forward) -> Error {
    let Forward { protocol, address, host, .. } = forward;
    Error::new(
        Code::Refused,
        format!("{name} cannot have the port {host} ({protocol}, {address}) of this host"),
    )
    .hint(format!(
        "end what has it (another machine?), or give the machine another one: `spinney set {name} --forward`"
    ))
}

fn host_forward(forward: &Forward) -> HostForward {
    let Forward { protocol, address, host, guest } = *forward;
    HostForward { udp: protocol == Protocol::Udp, address, host, guest }
}

fn of_host(forward: &HostForward) -> Forward {
    let HostForward { udp, address, host, guest } = *forward;
    Forward { protocol: if udp { Protocol::Udp } else { Protocol::Tcp }, address, host, guest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_unless_its_owner_ends_first() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let wanted: Forward = format!("{port}:22").parse().unwrap();
        let error = check_ports("web", &[wanted], &[]).unwrap_err();
        assert_eq!(error.code(), Code::Refused);
        assert!(error.to_string().contains(&port.to_string()), "{error}");
        check_ports("web", &[wanted], &[wanted]).unwrap();
        drop(listener);
        check_ports("web", &[wanted], &[]).unwrap();
    }
}
