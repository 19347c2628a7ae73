//! Errors as people meet them: one sentence, its causes below it, a hint; and what the exit code says.

use std::io::Write;
use std::process::ExitCode;

use server::Problem;
use server::snapshots::Code;

use crate::output;

/// Exit code of a class.
fn exit_code(code: Code) -> u8 {
    match code {
        Code::Failed => 1,
        Code::Usage => 2,
        Code::NotFound => 3,
        Code::Refused => 4,
        Code::Precondition => 5,
        Code::Damaged => 6,
        Code::NoSpace => 7,
        Code::NotPermitted => 8,
        Code::TimedOut => 9,
        Code::Interrupted => 130,
    }
}

/// Prints a problem on stderr and returns its exit code. `signalled` is that of the signal which had it cancelled.
pub(crate) fn print(problem: &Problem, json: bool, signalled: Option<u8>) -> ExitCode {
    let text = if json { document(problem) } else { words(problem, output::colours(&std::io::stderr())) };
    // With stderr gone the exit code still says it.
    let _ = std::io::stderr().write_all(text.as_bytes());
    let signalled = signalled.filter(|_| problem.code == Code::Interrupted);
    ExitCode::from(signalled.unwrap_or_else(|| exit_code(problem.code)))
}

/// Prints what clap says: help and version on stdout (0), mistakes on stderr (2).
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|arg| arg == "--json");
    if error.use_stderr() && json {
        let text = error.to_string();
        return print(&Problem::new(Code::Usage, text.trim_start_matches("error: ").trim_end()), true, None);
    }
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { 2 } else { 0 })
}

/// A usage problem, for what clap cannot check.
pub(crate) fn misuse(sentence: impl Into<String>) -> Problem {
    Problem::new(Code::Usage, sentence)
}

fn document(problem: &Problem) -> String {
    let mut value = serde_json::to_value(problem).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert("schema".to_owned(), "spinney.error/1".into());
    }
    format!("{value}\n")
}

fn words(problem: &Problem, colours: bool) -> String {
    let (red, cyan, off) = if colours { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
    let mut text = match problem.code {
        // What somebody wanted is no error.
        Code::Interrupted => format!("{}\n", problem.detail),
        _ => format!("{red}error:{off} {}\n", problem.detail),
    };
    for cause in &problem.cause {
        for line in cause.lines() {
            text.push_str("  ");
            text.push_str(line);
            text.push('\n');
        }
    }
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("{cyan}hint:{off} {hint}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Problem {
        let mut problem =
            Problem::new(Code::Refused, "web@base is protected").hint("`spinney unprotect web@base`");
        problem.cause = vec!["somebody wanted it so".into(), "two\nlines".into()];
        problem
    }

    #[test]
    fn words_name_the_thing_then_causes_then_the_hint() {
        insta::assert_snapshot!(words(&example(), false), @r"
        error: web@base is protected
          somebody wanted it so
          two
          lines
        hint: `spinney unprotect web@base`
        ");
    }

    #[test]
    fn what_was_called_off_is_no_error() {
        let problem = Problem::new(Code::Interrupted, "nothing was done");
        assert_eq!(words(&problem, true), "nothing was done\n");
        assert_eq!(exit_code(problem.code), 130);
    }

    #[test]
    fn json_has_a_schema_and_a_code() {
        let value: serde_json::Value = serde_json::from_str(&document(&example())).unwrap();
        assert_eq!((&value["schema"], &value["code"]), (&"spinney.error/1".into(), &"refused".into()));
    }
}
