//! The page of help and the command line say the same.

use super::*;

/// The line of the page that shows a command with its options.
fn entry(name: &str) -> Option<&'static str> {
    let is_of =
        |line: &str| line.strip_prefix("  ").and_then(|rest| rest.split(' ').next()) == Some(name);
    HELP.lines().find(|line| is_of(line))
}

#[test]
fn the_page_names_every_command_and_each_of_its_options() {
    let line = command_line();
    line.clone().debug_assert();
    for verb in line.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let entry = entry(verb.get_name()).unwrap_or_else(|| panic!("no `{}`", verb.get_name()));
        let options = verb.get_arguments().filter_map(clap::Arg::get_long);
        for option in options.filter(|option| !matches!(*option, "help" | "dir")) {
            assert!(entry.contains(&format!("--{option}")), "no --{option} in `{entry}`");
        }
    }
}

#[test]
fn the_vm_that_the_page_makes_is_a_valid_one() {
    let document = include_str!("../../../../deploy/guest/web.toml");
    proto::VmSpec::parse(document).unwrap();
    assert!(HELP.contains("deploy/guest/web.toml"));
}

#[test]
fn where_no_lab_runs_there_is_nothing_to_end() {
    let dir = tempfile::tempdir().unwrap();
    down(&dir.path().join("lab")).unwrap();
    assert!(
        Lab::attach(&dir.path().join("lab")).unwrap_err().to_string().contains("no lab is running")
    );
}

#[test]
fn a_node_is_named_by_its_number_or_its_name() {
    assert_eq!((number("3"), number("node3")), (Ok(3), Ok(3)));
    for wrong in ["", "node", "n3", "node-3", "3x"] {
        assert!(number(wrong).unwrap_err().contains("node3"), "{wrong}");
    }
    let words = ["lab", "ssh", "-t", "node3", "vim", "-R", "x"];
    let parsed = Arguments::from_arg_matches(&command_line().get_matches_from(words)).unwrap();
    let Command::Ssh { terminal, node, command } = parsed.command else { panic!("{parsed:?}") };
    assert_eq!((terminal, node, command), (true, 3, vec!["vim".into(), "-R".into(), "x".into()]));
}

#[test]
fn the_pages_examples_parse() {
    let examples =
        HELP.split(['\n', '|']).filter_map(|line| line.trim().strip_prefix("deploy/lab "));
    let examples = examples.map(|line| line.split(['#', '<']).next().unwrap_or_default());
    let mut tried = 0;
    for example in examples {
        let words = example.split_whitespace();
        let parsed = command_line().try_get_matches_from(["lab"].into_iter().chain(words));
        assert!(parsed.is_ok(), "{example}: {parsed:?}");
        tried += 1;
    }
    assert!(tried > 10, "only {tried} examples were found");
}
