//! `TARGET` and `TARGET@SNAP` as typed. Only the cut between the two is ours; what stands behind the `@` is read
//! by the engine.

use server::Problem;
use server::client::path;

use crate::errors::misuse;

/// True if the text means a snapshot, false if a machine.
pub(crate) fn is_snapshot(text: &str) -> bool {
    text.contains('@')
}

/// Path of the thing in the API, below which its verbs are.
pub(crate) fn resource(text: &str) -> Result<String, Problem> {
    if is_snapshot(text) {
        snapshot(text)?;
        return path(&["snapshots", text]);
    }
    path(&["targets", text])
}

/// Path of a verb on the thing.
pub(crate) fn verb(text: &str, verb: &str) -> Result<String, Problem> {
    Ok(format!("{}/{verb}", resource(text)?))
}

/// Path of a machine; an address of a snapshot makes no sense here.
pub(crate) fn target(text: &str) -> Result<String, Problem> {
    match text.split_once('@') {
        None => path(&["targets", text]),
        Some((target, _)) => {
            Err(misuse(format!("{text} is a snapshot, not a machine")).hint(format!("write {target} alone")))
        }
    }
}

/// Machine, and what stands behind the `@`.
pub(crate) fn snapshot(text: &str) -> Result<(&str, &str), Problem> {
    match text.split_once('@') {
        Some(("", _)) => Err(misuse(format!("{text} says no machine")).hint(
            "write TARGET@SNAP, such as web@before; `spinney tree` shows the machines and their snapshots",
        )),
        Some(parts) => Ok(parts),
        None => Err(misuse(format!("{text} is a machine, not a snapshot"))
            .hint(format!("write {text}@SNAP; `spinney tree {text}` shows the names"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_and_snapshots_are_told_apart() {
        assert_eq!(resource("web").unwrap(), "/v1/targets/web");
        assert_eq!(resource("web@{2h}").unwrap(), "/v1/snapshots/web@%7B2h%7D");
        assert_eq!(verb("shop/db1@t0", "protect").unwrap(), "/v1/snapshots/shop%2Fdb1@t0/protect");
        assert_eq!(snapshot("web@~2").unwrap(), ("web", "~2"));
        assert_eq!(snapshot("web@").unwrap(), ("web", ""));
    }

    #[test]
    fn mixing_them_up_is_a_usage_error_with_a_hint() {
        assert!(target("web@x").unwrap_err().hint.unwrap().contains("web alone"));
        assert!(snapshot("web").unwrap_err().hint.unwrap().contains("web@SNAP"));
        for bad in ["@", "@before"] {
            assert!(snapshot(bad).unwrap_err().hint.unwrap().contains("TARGET@SNAP"));
            assert!(resource(bad).unwrap_err().hint.unwrap().contains("TARGET@SNAP"));
        }
        assert!(resource("").is_err() && resource("..").is_err());
    }
}
