//! Drawings of made-up trees.

use serde_json::{Value, json};

use super::*;

/// Seconds of the moment at which the tree is looked at.
const NOW: i64 = 1_800_000_000;

fn config() -> Value {
    json!({ "memory": 536_870_912u64, "cpus": 1, "disks": [], "kernel": null, "initrd": null, "append": null,
        "networks": [], "memory_snapshots": true, "qemu_args": [] })
}

fn snapshot(name: &str, parent: Option<&str>, hours: i64, change: Value) -> Value {
    let created = Timestamp::from_second(NOW - hours * 3600).unwrap();
    let mut value = json!({ "id": name, "target": "web", "name": name, "state": "ready", "note": "", "parent": parent,
        "created": created, "undo_point": false, "power": "running", "mode": "stop-copy", "pause_us": 38_000,
        "took_us": 480_000, "memory_bytes": 536_870_912u64, "stored_bytes": 432_013_312u64, "disk_bytes": 0,
        "saved": { "zero": 0, "same": 0, "earlier": 0, "new": 0, "bytes_written": 0 },
        "keep": false, "protected": false, "depth": 1, "config": config() });
    for (key, new) in change.as_object().unwrap() {
        value[key] = new.clone();
    }
    value
}

fn tree(snapshots: Vec<Value>, here: Option<&str>) -> Tree {
    let machine = json!({ "id": "0", "name": "web", "power": "running", "group": "default", "config": config(),
        "uuid": "", "macs": [], "parent": here, "snapshots": snapshots.len(), "protected": false,
        "created": Timestamp::UNIX_EPOCH, "pid": 1, "console": null, "busy": null, "accel": "tcg", "qemu": "10.0" });
    serde_json::from_value(json!({ "machine": machine, "snapshots": snapshots, "here": here })).unwrap()
}

fn drawn(tree: &Tree, all: bool) -> String {
    draw(tree, Timestamp::from_second(NOW).unwrap(), all, None).join("\n")
}

#[test]
fn a_machine_without_snapshots() {
    insta::assert_snapshot!(drawn(&tree(vec![], None), false), @r"
    web
    ● You are here (running)
    ");
}

#[test]
fn branches() {
    let tree = tree(
        vec![
            snapshot("base", None, 50, json!({ "note": "fresh install", "protected": true })),
            snapshot(
                "before-upgrade",
                Some("base"),
                2,
                json!({ "stored_bytes": 12_345_678, "expires": Timestamp::from_second(NOW + 3 * 86_400).unwrap() }),
            ),
            snapshot("after", Some("before-upgrade"), 1, json!({ "pause_us": 212_000, "keep": true })),
            snapshot("other", Some("base"), 1, json!({ "power": "off", "mode": "off", "pause_us": null })),
        ],
        Some("before-upgrade"),
    );
    insta::assert_snapshot!(drawn(&tree, false));
}

#[test]
fn undo_points_are_folded_and_their_children_climb() {
    let undo = json!({ "undo_point": true });
    let snapshots = vec![
        snapshot("base", None, 5, json!({})),
        snapshot("undo-1", Some("base"), 4, undo.clone()),
        snapshot("child", Some("undo-1"), 3, json!({})),
        snapshot("undo-2", Some("child"), 2, undo),
    ];
    let tree_at = |here| tree(snapshots.clone(), Some(here));
    insta::assert_snapshot!(drawn(&tree_at("child"), false), @r"
    web
    ○ base   5 h ago  running  412 MiB  paused 38 ms
    ○ child  3 h ago  running  412 MiB  paused 38 ms
    ● You are here (running)
    (2 undo points; --all shows them)
    ");
    insta::assert_snapshot!("undo_points_shown", drawn(&tree_at("child"), true));
    assert!(drawn(&tree_at("undo-2"), false).contains("undo-2"), "here comes from it");
}

#[test]
fn parents_in_a_ring_end_the_drawing() {
    let snapshots = vec![
        snapshot("a", Some("b"), 1, json!({ "undo_point": true })),
        snapshot("b", Some("a"), 1, json!({ "undo_point": true })),
    ];
    assert!(drawn(&tree(snapshots, Some("a")), true).starts_with("web"));
}

#[test]
fn a_very_deep_tree_is_drawn() {
    let names: Vec<String> = (0..3000).map(|n| format!("s{n}")).collect();
    let snapshots = names
        .iter()
        .enumerate()
        .map(|(n, name)| snapshot(name, n.checked_sub(1).map(|n| names[n].as_str()), 1, json!({})));
    let drawing = drawn(&tree(snapshots.collect(), Some("s2999")), false);
    assert_eq!(drawing.lines().count(), 3002);
}

#[test]
fn notes_are_cut_to_the_terminal_and_memory_left_out_is_said() {
    let long = "all is well, and it was so yesterday, and the day before, and nobody has touched anything since\nthen";
    let tree = tree(
        vec![
            snapshot("base", None, 5, json!({ "note": long, "keep": true })),
            snapshot(
                "disks",
                Some("base"),
                4,
                json!({ "mode": "disk-only", "power": "off", "pause_us": null, "note": "two\nlines" }),
            ),
        ],
        Some("disks"),
    );
    let at = |width| draw(&tree, Timestamp::from_second(NOW).unwrap(), false, Some(width)).join("\n");
    insta::assert_snapshot!(at(100), @r#"
    web
    ○ base   5 h ago  running          412 MiB  paused 38 ms  kept  "all is well, and it was so yester…"
    ○ disks  4 h ago  off (disk only)  412 MiB                "two…"
    ● You are here (running)
    "#);
    assert!(at(100).lines().all(|line| line.chars().count() <= 100));
    assert!(at(30).contains("\"all is we…\""), "something is left on the narrowest terminal");
}

#[test]
fn a_long_name_moves_its_own_line_only_and_a_narrow_terminal_is_spared_the_pause() {
    let long = "a-rather-long-name-that-somebody-has-liked-for-years";
    let tree = tree(
        vec![
            snapshot("base", None, 5, json!({ "note": "all is well" })),
            snapshot(long, Some("base"), 4, json!({})),
            snapshot("next", Some(long), 3, json!({})),
        ],
        Some("next"),
    );
    let at = |width| draw(&tree, Timestamp::from_second(NOW).unwrap(), false, Some(width)).join("\n");
    insta::assert_snapshot!(at(60), @r#"
    web
    ○ base               5 h ago  running  412 MiB  "all is we…"
    ○ a-rather-long-name-that-somebody-has-liked-for-years  4 h ago  running  412 MiB
    ○ next               3 h ago  running  412 MiB
    ● You are here (running)
    "#);
    assert!(at(100).contains("paused"), "there is room for it");
}
