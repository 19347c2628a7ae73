//! Addresses of snapshots: `web@before`, `web@`, `web@~2`, `web@{2h}`, `web@id:3f2a`.

use std::time::Duration;

use jiff::Timestamp;
use rusqlite::Transaction;

use crate::catalog::{SnapshotRow, TargetRow, now};
use crate::error::{Code, Error, Result};

/// What stands behind the `@`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Which {
    Name(String),
    /// So many above here; 1 is the parent of here.
    Above(u32),
    OlderThan(Duration),
    Id(String),
}

/// Splits `web@before` into target and the rest; the rest is none without an `@`.
pub(crate) fn split(address: &str) -> (&str, Option<&str>) {
    match address.split_once('@') {
        Some((target, rest)) => (target, Some(rest)),
        None => (address, None),
    }
}

fn parse(address: &str, rest: &str) -> Result<Which> {
    let bad = || {
        Error::new(Code::Usage, format!("{address:?} is not the address of a snapshot")).hint(
            "write TARGET@NAME, TARGET@ (the parent of here), TARGET@~2, TARGET@{2h} or TARGET@id:PREFIX",
        )
    };
    if rest.is_empty() {
        return Ok(Which::Above(1));
    }
    if let Some(count) = rest.strip_prefix('~') {
        let count = if count.is_empty() { 1 } else { count.parse().map_err(|_| bad())? };
        return Ok(Which::Above(count));
    }
    if let Some(id) = rest.strip_prefix("id:") {
        let hex = !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit());
        return if hex { Ok(Which::Id(id.to_ascii_lowercase())) } else { Err(bad()) };
    }
    if let Some(age) = rest.strip_prefix('{') {
        let age = age.strip_suffix('}').and_then(parse_age).ok_or_else(bad)?;
        return Ok(Which::OlderThan(age));
    }
    crate::name::check_name("snapshot", rest).map_err(|_| bad())?;
    Ok(Which::Name(rest.to_owned()))
}

/// `90s`, `15m`, `2h`, `3d`, `1w`.
fn parse_age(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        'w' => 604_800,
        _ => return None,
    };
    let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
    Some(Duration::from_secs(count.checked_mul(seconds)?))
}

/// The target and the snapshot that an address means. Removed snapshots are not found.
pub(crate) fn resolve(tx: &Transaction<'_>, address: &str) -> Result<(TargetRow, SnapshotRow)> {
    let (name, rest) = split(address);
    let Some(rest) = rest else {
        return Err(Error::new(Code::Usage, format!("{address:?} names a machine, not a snapshot"))
            .hint(format!("write {address}@NAME; `spinney tree {address}` shows the names")));
    };
    let which = parse(address, rest)?;
    let target = TargetRow::by_name(tx, name)?;
    let found = match &which {
        Which::Name(name) => SnapshotRow::by_name(tx, &target.id, name)?,
        Which::Above(count) => above(tx, &target, *count)?,
        Which::OlderThan(age) => {
            let border = now().checked_sub(*age).unwrap_or(Timestamp::MIN);
            let mut all = SnapshotRow::of_target(tx, &target.id)?;
            all.retain(|s| s.removed.is_none() && !s.undo_point && s.created <= border);
            all.into_iter().max_by_key(|s| s.created)
        }
        Which::Id(prefix) => {
            let mut all = SnapshotRow::of_target(tx, &target.id)?;
            all.retain(|s| s.removed.is_none() && s.id.starts_with(prefix.as_str()));
            if all.len() > 1 {
                return Err(Error::new(Code::Usage, format!("{address} means more than one snapshot"))
                    .hint("give more digits of the id"));
            }
            all.pop()
        }
    };
    match found {
        Some(snapshot) => Ok((target, snapshot)),
        None => Err(not_found(address, &target, &which)),
    }
}

/// So many above here; none if the tree ends before.
fn above(tx: &Transaction<'_>, target: &TargetRow, count: u32) -> Result<Option<SnapshotRow>> {
    let mut at = None;
    let mut parent = target.parent.clone();
    for _ in 0..count {
        let Some(id) = SnapshotRow::visible(tx, parent.as_deref())? else { return Ok(None) };
        let row = SnapshotRow::by_id(tx, &id)?;
        parent.clone_from(&row.parent);
        at = Some(row);
    }
    Ok(at)
}

fn not_found(address: &str, target: &TargetRow, which: &Which) -> Error {
    let name = &target.name;
    let message = match which {
        Which::Above(1) => format!("{name} has no snapshot that it comes from"),
        Which::Above(count) => format!("{name} has no snapshot {count} above where it stands"),
        Which::OlderThan(_) => format!("{name} has no snapshot that old: {address}"),
        Which::Name(_) | Which::Id(_) => format!("there is no snapshot {address}"),
    };
    Error::new(Code::NotFound, message).hint(format!("`spinney tree {name}` shows its snapshots"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let parse = |rest: &str| parse("web", rest);
        assert_eq!(parse("").unwrap(), Which::Above(1));
        assert_eq!(parse("~").unwrap(), Which::Above(1));
        assert_eq!(parse("~2").unwrap(), Which::Above(2));
        assert_eq!(parse("{2h}").unwrap(), Which::OlderThan(Duration::from_secs(7200)));
        assert_eq!(parse("id:3F2a").unwrap(), Which::Id("3f2a".into()));
        assert_eq!(parse("before-upgrade").unwrap(), Which::Name("before-upgrade".into()));
    }

    #[test]
    fn what_is_none_is_a_usage_error() {
        let far = format!("{{{}w}}", u64::MAX);
        for bad in ["~x", "~-1", "{2}", "{h}", "{2h", "id:", "id:xyz", "-a", "a b", "a@b", &far] {
            assert_eq!(parse("web", bad).unwrap_err().code(), Code::Usage, "{bad:?}");
        }
    }
}
