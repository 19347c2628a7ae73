//! The command line as a whole: the reference, and what clap alone refuses.

use clap::{CommandFactory, Parser};

use super::*;

/// Help of a command and of everything below it.
fn reference(command: &mut clap::Command, path: &str, out: &mut String) {
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    out.push_str(&format!("===== {path}\n{}\n\n", lines.join("\n").trim_end()));
    for sub in command.get_subcommands_mut() {
        let name = sub.get_name().to_owned();
        if name != "help" && !sub.is_hide_set() {
            reference(sub, &format!("{path} {name}"), out);
        }
    }
}

#[test]
fn the_reference() {
    let mut command = Cli::command().term_width(100);
    command.build();
    let mut out = String::new();
    reference(&mut command, "spinney", &mut out);
    insta::assert_snapshot!(out);
}

#[test]
fn clap_finds_no_fault() {
    Cli::command().debug_assert();
}

#[test]
fn peers_words_are_understood() {
    for line in ["snapshot web", "revert web@a", "restore web@a", "rollback web@a", "delete web@a", "log web"]
    {
        assert!(Cli::try_parse_from(["spinney"].into_iter().chain(line.split(' '))).is_ok(), "{line}");
    }
}

#[test]
fn good_lines() {
    for line in [
        "create web --memory 512M --disk 1G --disk a.img --qemu-arg=-device --qemu-arg nvme,serial=1",
        "create --file machine.toml",
        "create web --kernel k --append -x",
        "goto web@a --off --discard -y",
        "edit web@a --keep",
        "edit web@a --expire never",
        "edit web@a --keep=false --expire 4w",
        "take web a --expire 7d",
        "edit web@a --keep=false -m x",
        "stop web --timeout 5",
        "--json ls",
        "ls --json -v",
        "du web --without a,b",
        "group create work --owner 1000",
        "group rm work -y",
        "create web --group work",
        "edit web --group work",
    ] {
        let parsed = Cli::try_parse_from(["spinney"].into_iter().chain(line.split(' ')));
        assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
    }
}

#[test]
fn bad_lines_say_what_is_wrong() {
    for (line, words) in [
        ("create web --memory 0G", "more than nothing"),
        ("create web --memory 16E", "8 EiB"),
        ("create web --memory 512", "write 512M"),
        ("create web --disk 0M", "more than nothing"),
        ("create web --cpus 0", "0 is not in 1.."),
        ("create", "required"),
        ("create --file f --memory 1G", "cannot be used with"),
        ("create web --network lan", "possible values"),
        ("goto web@a --off --running", "cannot be used with"),
        ("edit web@a", "required"),
        ("edit web --group work --name x", "cannot be used with"),
        ("create --file f --group work", "cannot be used with"),
        ("group", "Usage"),
        ("take web --expire 7", "write 7d"),
        ("take web --expire never", "a number and"),
        ("take web --expire 7d --keep", "cannot be used with"),
        ("edit web --group work --expire 7d", "cannot be used with"),
        ("take web --mode swiftly", "possible values"),
        ("take web --disk-only --mode stop-copy", "cannot be used with"),
    ] {
        let error = Cli::try_parse_from(["spinney"].into_iter().chain(line.split(' '))).unwrap_err();
        assert!(error.to_string().contains(words), "{line}: {error}");
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}
