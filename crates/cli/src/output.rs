//! What goes to stdout and stderr: documents, tables, units, colours.

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::time::Instant;

use jiff::Timestamp;
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use serde_json::Value;

/// How to speak.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// One JSON document instead of words.
    pub(crate) json: bool,
    /// No notes.
    pub(crate) quiet: bool,
    /// More notes.
    pub(crate) verbose: bool,
    colours: bool,
    /// Columns of the terminal; none off a terminal, where nothing is cut.
    pub(crate) width: Option<usize>,
}

/// What a cut column keeps at least, however narrow the terminal is.
pub(crate) const LEAST: usize = 10;
/// What names have at least, so that most of them fit.
pub(crate) const NAME_LEAST: usize = 16;
/// A terminal narrower than this is shown less.
const NARROW: usize = 80;
/// Columns of a terminal that does not tell.
const USUAL_WIDTH: usize = 80;

/// How a piece of text looks on a terminal.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    Bold,
    Dim,
    Good,
    Warning,
    Bad,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool, verbose: bool) -> Self {
        Self { json, quiet, verbose, colours: !json && colours(&io::stdout()), width: terminal_width() }
    }

    /// True on a terminal that has no room for everything.
    pub(crate) fn narrow(&self) -> bool {
        self.width.is_some_and(|width| width < NARROW)
    }

    /// Data, on stdout.
    pub(crate) fn line(&self, text: impl Display) {
        let result = writeln!(io::stdout(), "{text}");
        match result {
            Ok(()) => {}
            // `| head` has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
            Err(error) => {
                let _ = writeln!(io::stderr(), "error: cannot write to stdout\n  {error}");
                std::process::exit(1);
            }
        }
    }

    /// The one document of `--json`: `value` with a `schema` field.
    pub(crate) fn document(&self, schema: &str, value: &impl Serialize) {
        let mut value = serde_json::to_value(value).unwrap_or_default();
        match value.as_object_mut() {
            Some(object) => _ = object.insert("schema".to_owned(), schema.into()),
            None => value = serde_json::json!({ "schema": schema, "value": value }),
        }
        self.line(format_args!("{value:#}"));
    }

    /// A note for people, on stderr.
    pub(crate) fn note(&self, text: impl Display) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// What people should know whether they want notes or not, on stderr.
    pub(crate) fn warning(&self, text: impl Display) {
        if !self.json {
            let (yellow, off) = if colours(&io::stderr()) { ("\x1b[1;33m", "\x1b[0m") } else { ("", "") };
            let _ = writeln!(io::stderr(), "{yellow}warning:{off} {text}");
        }
    }

    /// A detail that only `-v` shows, on stderr.
    pub(crate) fn detail(&self, text: impl Display) {
        if self.verbose && !self.json {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// An event of `--json`, one line on stderr.
    pub(crate) fn event(&self, schema: &str, value: &impl Serialize) {
        let mut value = serde_json::to_value(value).unwrap_or(Value::Null);
        if let Some(object) = value.as_object_mut() {
            object.insert("schema".to_owned(), schema.into());
        }
        let _ = writeln!(io::stderr(), "{value}");
    }

    /// Text in a style, if there are colours.
    pub(crate) fn paint(&self, style: Style, text: impl Display) -> String {
        if !self.colours {
            return text.to_string();
        }
        let code = match style {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Good => "32",
            Style::Warning => "33",
            Style::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// A table, on stdout. The first row is the head. On a terminal the last column is cut to what is left of the line.
    pub(crate) fn table(&self, rows: &[Vec<String>]) {
        for (n, line) in columns(rows, self.width).iter().enumerate() {
            if n == 0 {
                self.line(self.paint(Style::Bold, line));
            } else {
                self.line(line);
            }
        }
    }
}

/// True if a stream shows colours: a terminal, and nobody asked for none.
pub(crate) fn colours(stream: &impl IsTerminal) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !refused && !dumb
}

fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    let size = stdout.is_terminal().then(|| tcgetwinsize(&stdout).ok())?;
    Some(size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0).unwrap_or(USUAL_WIDTH))
}

/// Rows as lines, their columns under each other, two spaces apart. A column of numbers is set to the right, and the last
/// one is cut so that lines fit into `fit`. Where that is not enough the widest of the others takes no more room than there is: what
/// is longer there (a name, which nobody could type if it were cut) moves its own line, and no other.
pub(crate) fn columns(rows: &[Vec<String>], fit: Option<usize>) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let column = |n: usize| rows.iter().filter_map(move |row| row.get(n));
    let mut width: Vec<usize> =
        (0..count).map(|n| column(n).map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
    // A number, perhaps with a unit behind it, or the dash that stands for none.
    let number = |cell: &String| {
        let mut words = cell.split(' ');
        let first = words.next().unwrap_or_default();
        let digits = first.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        cell == "-" || !first.is_empty() && digits && words.count() < 2
    };
    let numbers = |n: usize| column(n).skip(1).all(number) && column(n).skip(1).any(|cell| cell != "-");
    let right: Vec<bool> = (0..count).map(numbers).collect();
    if let Some(fit) = fit {
        let all = width.iter().sum::<usize>() + 2 * count.saturating_sub(1);
        let last = width.last().copied().unwrap_or(0);
        let over = (all - last + last.min(LEAST)).saturating_sub(fit);
        let (others, _) = width.split_at_mut(count.saturating_sub(1));
        if let Some(widest) = others.iter_mut().max() {
            *widest = (*widest).min(widest.saturating_sub(over).max(NAME_LEAST));
        }
    }
    let used = width.iter().take(count.saturating_sub(1)).map(|width| width + 2).sum();
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().zip(&width).zip(&right).enumerate().map(|(n, ((cell, width), right))| match fit {
                _ if *right => format!("{cell:>width$}"),
                Some(fit) if n + 1 == count => cut(cell, room(fit, used)),
                _ => format!("{cell:<width$}"),
            });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// Columns that are left for the last part of a line.
pub(crate) fn room(fit: usize, used: usize) -> usize {
    fit.saturating_sub(used).max(LEAST)
}

/// Text of at most `width` characters, with an ellipsis where it was cut.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{}…", kept.trim_end().trim_end_matches('…'))
}

/// Text as lines of at most `width` characters, broken between words; a longer word has a line of its own.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Bytes in the unit that leaves one to four digits.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    let mut units = UNITS.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    for next in units {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let digits = if value < 99.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{} {unit}", digits.strip_suffix(".0").unwrap_or(&digits))
}

/// A span of microseconds: `0.4 ms`, `38 ms`, `1.2 s`.
pub(crate) fn span(microseconds: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let ms = microseconds as f64 / 1000.0;
    match ms {
        ms if ms < 9.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 59_950.0 => format!("{:.1} s", ms / 1000.0),
        ms => format!("{:.0} min", ms / 60_000.0),
    }
}

/// How long ago: `now`, `5 min ago`, `2 h ago`, `3 d ago`.
pub(crate) fn ago(now: Timestamp, then: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second());
    match seconds {
        ..2 => "now".to_owned(),
        2..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// How long until then: `5 min`, `2 h`, `3 d`; begun ones count, so that what was given seven days has seven at first. None if it
/// is over.
pub(crate) fn left(now: Timestamp, then: Timestamp) -> Option<String> {
    let seconds =
        then.as_millisecond().saturating_sub(now.as_millisecond()).max(0).unsigned_abs().div_ceil(1000);
    Some(match seconds {
        0 => return None,
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds.div_ceil(60)),
        3600..172_800 => format!("{} h", seconds.div_ceil(3600)),
        _ => format!("{} d", seconds.div_ceil(86_400)),
    })
}

/// `expires in 3 d`; `expires now` when its time has come and it has to wait.
pub(crate) fn expires(now: Timestamp, then: Timestamp) -> String {
    left(now, then).map_or_else(|| "expires now".to_owned(), |left| format!("expires in {left}"))
}

/// Whole microseconds since `began`.
pub(crate) fn micros(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// One line of foreign text without what a terminal would obey.
pub(crate) fn plain(text: &str) -> String {
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let mut out: String = first.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if lines.next().is_some() {
        out.push('…');
    }
    out
}

/// `1 page`, `2 pages`.
pub(crate) fn count(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        let shown: Vec<_> = [0, 1, 1023, 1024, 1536, 40_055_603, 512 << 20, (1 << 30) - 1, 1 << 40, u64::MAX]
            .map(bytes)
            .into();
        assert_eq!(
            shown,
            ["0 B", "1 B", "1023 B", "1 KiB", "1.5 KiB", "38.2 MiB", "512 MiB", "1 GiB", "1 TiB", "16 EiB"]
        );
        let shown: Vec<_> = [0, 400, 38_000, 212_400, 1_250_000, 90_000_000].map(span).into();
        assert_eq!(shown, ["0.0 ms", "0.4 ms", "38 ms", "212 ms", "1.2 s", "2 min"]);
    }

    #[test]
    fn ages() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let before = |s: i64| ago(now, Timestamp::from_second(1_000_000 - s).unwrap());
        assert_eq!(
            [-5, 0, 59, 60, 7200, 172_800].map(before),
            ["now", "now", "59 s ago", "1 min ago", "2 h ago", "2 d ago"]
        );
    }

    #[test]
    fn what_is_left() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let after = |ms: i64| expires(now, Timestamp::from_millisecond(1_000_000_000 + ms).unwrap());
        assert_eq!(
            [-5, 0, 1, 59_000, 3_600_000, 7 * 86_400_000 - 20, i64::from(u32::MAX)].map(after),
            [
                "expires now",
                "expires now",
                "expires in 1 s",
                "expires in 59 s",
                "expires in 1 h",
                "expires in 7 d",
                "expires in 50 d"
            ]
        );
    }

    #[test]
    fn foreign_text_cannot_command_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nsecond"), "a\u{fffd}[2Jb…");
    }

    #[test]
    fn numbers_are_set_to_the_right() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows =
            [row(["NAME", "SIZE", "NOTE"]), row(["web", "1 GiB", ""]), row(["database", "12 MiB", "x"])];
        assert_eq!(
            columns(&rows, None),
            ["NAME        SIZE  NOTE", "web        1 GiB", "database  12 MiB  x"]
        );
    }

    #[test]
    fn ages_are_set_to_the_left_whatever_they_are() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows = [row(["WHEN", "WHAT"]), row(["12 s ago", "take"]), row(["2 s ago", "rm"])];
        assert_eq!(columns(&rows, None), ["WHEN      WHAT", "12 s ago  take", "2 s ago   rm"]);
    }

    #[test]
    fn a_long_name_moves_its_own_line_only() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let long = "a-name-that-is-longer-than-others";
        let rows = [row(["NAME", "SIZE", "NOTE"]), row([long, "1 GiB", "a note"]), row(["db", "2 GiB", ""])];
        assert_eq!(
            columns(&rows, Some(40)),
            [
                "NAME                        SIZE  NOTE",
                "a-name-that-is-longer-than-others  1 GiB  a note",
                "db                         2 GiB"
            ]
        );
        assert_eq!(columns(&rows, Some(80))[2], "db                                 2 GiB");
    }

    #[test]
    fn the_last_column_is_cut_to_the_line() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows =
            [row(["NAME", "NOTE"]), row(["web", "all is well, and nobody has touched it"]), row(["db", "x"])];
        assert_eq!(columns(&rows, Some(30)), ["NAME  NOTE", "web   all is well, and nobody…", "db    x"]);
        assert_eq!(columns(&rows, Some(5)), ["NAME  NOTE", "web   all is we…", "db    x"]);
        assert_eq!(cut("ab…", 2), "a…");
        assert_eq!(cut("é…", 2), "é…");
        assert_eq!(wrap("guests run several  times slower", 12), ["guests run", "several", "times slower"]);
        assert_eq!(wrap("a-long-word b", 4), ["a-long-word", "b"]);
    }
}
