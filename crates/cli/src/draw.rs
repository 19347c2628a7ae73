//! A target's tree, drawn like a graph of commits: what stands under another in one column comes from it, and only a branch
//! moves to the right. So a line of two hundred snapshots is as narrow as one of two. "Here" is a child like any other.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use server::snapshots::{Mode, Power, Snapshot, SnapshotState, Tree};

use crate::output::{LEAST, NAME_LEAST, ago, bytes, cut, expires, plain, room, span};

/// One line of the drawing: branches and name first, then what stands in columns, then words and the note.
#[derive(Default)]
struct Line {
    label: String,
    cells: Vec<String>,
    words: Vec<String>,
    note: String,
}

/// Draws the tree. Undo points are folded away unless `all`; one that here comes from is shown. Notes are cut so that lines
/// fit into `width`.
pub(crate) fn draw(tree: &Tree, now: Timestamp, all: bool, width: Option<usize>) -> Vec<String> {
    let by_id: HashMap<&str, &Snapshot> = tree.snapshots.iter().map(|s| (s.id.as_str(), s)).collect();
    let shown = |s: &Snapshot| all || !s.undo_point || tree.here.as_deref() == Some(&s.id);
    // The nearest shown ancestor; bounded, should parents ever form a ring.
    let above = |id: Option<&str>| {
        let mut next = id.and_then(|id| by_id.get(id));
        for _ in 0..tree.snapshots.len() {
            match next {
                Some(s) if !shown(s) => next = s.parent.as_deref().and_then(|id| by_id.get(id)),
                _ => break,
            }
        }
        next.map(|s| s.id.as_str())
    };
    let mut children: HashMap<Option<&str>, Vec<Child<'_>>> = HashMap::new();
    for snapshot in tree.snapshots.iter().filter(|s| shown(s)) {
        children.entry(above(snapshot.parent.as_deref())).or_default().push(Child::Snapshot(snapshot));
    }
    children.entry(above(tree.here.as_deref())).or_default().push(Child::Here);

    let mut drawing = Drawing { tree, now, children, lines: Vec::new(), seen: HashSet::new() };
    drawing.descend(None, "");
    let folded = tree.snapshots.iter().filter(|s| !shown(s)).count();
    drawing.finish(folded, width)
}

/// What hangs below a snapshot.
#[derive(Clone, Copy)]
enum Child<'a> {
    Snapshot(&'a Snapshot),
    Here,
}

struct Drawing<'a> {
    tree: &'a Tree,
    now: Timestamp,
    children: HashMap<Option<&'a str>, Vec<Child<'a>>>,
    lines: Vec<Line>,
    seen: HashSet<&'a str>,
}

impl<'a> Drawing<'a> {
    fn descend(&mut self, parent: Option<&'a str>, prefix: &str) {
        // A tree may be a hundred thousand snapshots deep; the stack of this program is not.
        let mut stack = vec![(self.children_of(parent), prefix.to_owned())];
        while let Some((siblings, prefix)) = stack.last_mut() {
            let Some((child, only)) = siblings.next() else {
                stack.pop();
                continue;
            };
            let (branch, below) = match (only, siblings.len() == 0) {
                (true, _) => ("", ""),
                (false, true) => ("└─", "  "),
                (false, false) => ("├─", "│ "),
            };
            let (label, below) = (format!("{prefix}{branch}"), format!("{prefix}{below}"));
            match child {
                Child::Here => {
                    let label = format!("{label}● You are here ({})", power(self.tree.machine.power));
                    self.lines.push(Line { label, ..Line::default() });
                }
                Child::Snapshot(snapshot) => {
                    if !self.seen.insert(&snapshot.id) {
                        continue;
                    }
                    let label = format!("{label}○ {}", snapshot.name);
                    self.lines.push(self.line(label, snapshot));
                    stack.push((self.children_of(Some(&snapshot.id)), below));
                }
            }
        }
    }

    /// What hangs below a snapshot, each with whether it is the only one.
    fn children_of(&mut self, parent: Option<&'a str>) -> std::vec::IntoIter<(Child<'a>, bool)> {
        let children = self.children.remove(&parent).unwrap_or_default();
        let only = children.len() == 1;
        children.into_iter().map(|child| (child, only)).collect::<Vec<_>>().into_iter()
    }

    fn line(&self, label: String, s: &Snapshot) -> Line {
        let saving = s.state == SnapshotState::Saving;
        let damaged = s.state == SnapshotState::Damaged;
        let words = [
            (saving, "saving"),
            (damaged, "damaged"),
            (s.undo_point, "undo point"),
            (s.protected, "protected"),
            (s.keep, "kept"),
        ];
        let expires = s.expires.map(|then| match s.protected && then <= self.now {
            true => "expires when it is not protected any more".to_owned(),
            false => expires(self.now, then),
        });
        Line {
            label,
            cells: vec![
                ago(self.now, s.created),
                state(s).to_owned(),
                bytes(s.stored_bytes + s.disk_bytes),
                s.pause_us.map(|us| format!("paused {}", span(us))).unwrap_or_default(),
            ],
            words: words
                .into_iter()
                .filter(|(is, _)| *is)
                .map(|(_, word)| word.to_owned())
                .chain(expires)
                .collect(),
            note: plain(&s.note),
        }
    }

    /// Sets the cells under each other and adds head and foot.
    fn finish(self, folded: usize, fit: Option<usize>) -> Vec<String> {
        let wide = |n: usize| {
            self.lines.iter().filter_map(|l| l.cells.get(n)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..4).map(wide).collect();
        let with_cells = self.lines.iter().filter(|line| !line.cells.is_empty());
        let label_width = with_cells.map(|line| line.label.chars().count()).max().unwrap_or(0);
        // On a narrow terminal a long name moves its own line, and no other; and the pause is left to `show`.
        let cells = |widths: &[usize]| -> usize {
            widths.iter().filter(|width| **width > 0).map(|width| width + 2).sum()
        };
        // Two spaces and two quotation marks.
        let notes = if self.lines.iter().any(|line| !line.note.is_empty()) { LEAST + 4 } else { 0 };
        let most = |fit: usize, widths: &[usize]| fit.saturating_sub(cells(widths) + notes).max(NAME_LEAST);
        if fit.is_some_and(|fit| cells(&widths) + notes + label_width.min(NAME_LEAST) > fit) {
            widths.truncate(3);
        }
        let label_width = fit.map_or(label_width, |fit| label_width.min(most(fit, &widths)));
        let mut out = vec![self.tree.machine.name.clone()];
        for line in &self.lines {
            let mut text = format!("{:<label_width$}", line.label);
            for (cell, width) in line.cells.iter().zip(&widths).filter(|(_, width)| **width > 0) {
                text.push_str(&format!("  {cell:<width$}"));
            }
            for word in &line.words {
                text.push_str("  ");
                text.push_str(word);
            }
            if !line.note.is_empty() {
                // Two spaces and two quotation marks.
                let used = text.chars().count() + 4;
                let note = fit.map_or_else(|| line.note.clone(), |fit| cut(&line.note, room(fit, used)));
                text.push_str(&format!("  \"{note}\""));
            }
            out.push(text.trim_end().to_owned());
        }
        match folded {
            0 => {}
            1 => out.push("(1 undo point; --all shows it)".to_owned()),
            n => out.push(format!("({n} undo points; --all shows them)")),
        }
        out
    }
}

/// The state that a snapshot brings back, in words.
pub(crate) fn state(snapshot: &Snapshot) -> &'static str {
    match snapshot.mode {
        Mode::DiskOnly => "off (disk only)",
        _ => power(snapshot.power),
    }
}

/// A power state in words.
pub(crate) fn power(power: Power) -> &'static str {
    match power {
        Power::Off => "off",
        Power::Paused => "paused",
        Power::Running => "running",
        Power::LostPower => "lost power",
        Power::Suspended => "suspended",
    }
}

#[cfg(test)]
mod tests;
