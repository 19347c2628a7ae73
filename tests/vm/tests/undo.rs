//! `undo` of what removed undo points: the names that it gives back are still free.

use vm_tests::harness::Spinney;

#[test]
fn the_name_of_an_undo_point_is_not_given_again_while_undo_can_bring_it_back() {
    let spinney = Spinney::new();
    spinney.ok("create web --memory 64M --disk 8M --network none").expect("a machine");
    spinney.ok("take web base").unwrap();
    // Seven undo points; the collector forgets those that are one too many, so that there are fewer than the last one's number.
    for _ in 0..7 {
        spinney.ok("goto web@base").unwrap();
    }
    spinney.ok("gc --now").unwrap();
    spinney.ok("take web top").unwrap();
    spinney.ok("goto web@base").unwrap();
    let names = || {
        let tree = spinney.ok("tree web").unwrap();
        let list = tree["snapshots"].as_array().unwrap().iter();
        list.map(|s| s["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert!(names().contains(&"undo-8".to_owned()), "{:?}", names());
    // It was kept where the machine stood, so it goes with what is above it.
    spinney.ok("rm web@top --tree --yes").unwrap();
    assert!(!names().contains(&"undo-8".to_owned()), "{:?}", names());
    spinney.ok("goto web@base").unwrap();
    spinney.ok("undo").unwrap();
    let log = spinney.ok("op log -n 50").unwrap();
    let removal = log["operations"].as_array().unwrap().iter().find(|op| op["kind"] == "rm").unwrap();
    spinney.ok(&format!("undo {}", removal["id"].as_str().unwrap())).unwrap();
    assert!(names().contains(&"undo-8".to_owned()), "{:?}", names());

    // By its name, though it has none at the moment.
    spinney.ok("rm web --yes").unwrap();
    spinney.ok("undo web").unwrap();
    assert!(names().contains(&"base".to_owned()), "{:?}", names());
}
