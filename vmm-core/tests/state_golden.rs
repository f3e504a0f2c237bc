//! The saved state of each released version of the container reads for ever, and what this build
//! writes is byte for byte what the golden file of the current version holds.

use vmm_core::state::{Section, read_sections, write_sections};

fn sections() -> Vec<Section> {
    vec![
        Section { kind: 1, instance: 0, version: 1, bytes: b"a machine".to_vec() },
        Section { kind: 2, instance: 0, version: 1, bytes: vec![] },
        Section { kind: 2, instance: 1, version: 3, bytes: (0..=255).collect() },
        Section { kind: 0x1234, instance: 0xfffe, version: 0x0102, bytes: vec![0xff; 3] },
    ]
}

#[test]
fn container_version_1() {
    let golden = include_bytes!("golden/state-1.bin");
    assert_eq!(read_sections(golden).expect("the golden file reads"), sections());
    assert_eq!(write_sections(&sections()).expect("the sections write"), golden);
}
