//! Which names and notes are allowed.

use crate::error::{Code, Error, Result};

/// Longest name, in bytes.
const NAME_LIMIT: usize = 64;
/// Longest note, in characters.
const NOTE_LIMIT: usize = 4096;

/// Letters, digits, `.`, `_`, `-`; the first a letter or digit.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let bad = |reason: &str| {
        Err(Error::new(Code::Usage, format!("{:?} cannot be the name of a {what}: {reason}", short(name)))
            .hint("names are letters, digits, '.', '_' and '-', and start with a letter or digit"))
    };
    if name.is_empty() {
        return bad("it is empty");
    }
    if name.len() > NAME_LIMIT {
        return bad("it is longer than 64 characters");
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return bad("it starts with neither a letter nor a digit");
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        Some(c) => bad(&format!("it has {c:?} in it")),
        None => Ok(()),
    }
}

/// As [`check_name`], for a name that somebody chooses: "undo-7" is what an undo point is called.
pub(crate) fn check_snapshot_name(name: &str) -> Result<()> {
    check_name("snapshot", name)?;
    match name.strip_prefix("undo-") {
        Some(number) if number.bytes().all(|b| b.is_ascii_digit()) => Err(Error::new(
            Code::Usage,
            format!("{name:?} cannot be the name of a snapshot: undo points are called so"),
        )
        .hint("choose any name but undo-NUMBER")),
        _ => Ok(()),
    }
}

/// Any text of bounded length.
pub(crate) fn check_note(note: &str) -> Result<()> {
    let length = note.chars().count();
    if length > NOTE_LIMIT {
        return Err(Error::new(
            Code::Usage,
            format!("the note has {length} characters; {NOTE_LIMIT} is the most"),
        ));
    }
    Ok(())
}

fn short(name: &str) -> String {
    let cut: String = name.chars().take(40).collect();
    if cut.len() < name.len() { cut + "…" } else { cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_kept() {
        for good in ["web", "9a", "a.b_c-d", "A"] {
            check_name("machine", good).unwrap();
        }
        let long = "a".repeat(65);
        for bad in ["", "-a", ".a", "_a", "a b", "a@b", "a/b", "é", "a\n", &long] {
            assert_eq!(check_name("machine", bad).unwrap_err().code(), Code::Usage, "{bad:?}");
        }
    }

    #[test]
    fn names_of_undo_points_are_not_for_people() {
        for good in ["undo", "undo-x", "undo-1a", "undoing-1"] {
            check_snapshot_name(good).unwrap();
        }
        for bad in ["undo-", "undo-1", "undo-007"] {
            assert_eq!(check_snapshot_name(bad).unwrap_err().code(), Code::Usage, "{bad:?}");
        }
    }

    #[test]
    fn notes_are_bounded() {
        check_note(&"ä".repeat(4096)).unwrap();
        assert_eq!(check_note(&"a".repeat(5000)).unwrap_err().code(), Code::Usage);
    }
}
