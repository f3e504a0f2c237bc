//! What becomes of good and of hostile ELF images, from the boot source down.

#[allow(dead_code, reason = "guests use more of it")]
#[path = "../../../tests/flat/elf.rs"]
mod image;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::{BootRegisters, BootSource};
use super::*;
use image::{
    CODE, CODE_OFFSET, E_MACHINE, E_PHENTSIZE, E_PHNUM, E_PHOFF, ENTRY, NOTE_NAME, NOTE_NAME_SIZE,
    NOTE_SIZE, NOTE_TYPE, NOTE_VALUE, P_ALIGN, P_FILESZ, P_MEMSZ, P_OFFSET, P_PADDR, P_TYPE, ZEROS,
    ZEROS_BYTES, field, file, kernel, put,
};

const MEMORY: u64 = 4 << 20;
const HUGE: [u8; 8] = [0xff; 8];

fn memory() -> GuestMemory {
    crate::memory::create(MEMORY, 0).unwrap()
}

fn code() -> Vec<u8> {
    (0..5000_u32).map(|at| at.to_le_bytes()[0] | 1).collect()
}

fn boot(image: &[u8], memory: &GuestMemory) -> Result<BootRegisters, BootError> {
    let boot = BootSource::Linux { kernel: file(image), initrd: None, cmdline: "quiet".to_owned() };
    boot.load(memory, 1)
}

/// The image with each of the places changed, and what is said about it.
fn refused(changes: &[(usize, &[u8])]) -> String {
    let mut image = kernel(&code());
    for (at, bytes) in changes {
        put(&mut image, *at, bytes);
    }
    boot(&image, &memory()).unwrap_err().to_string()
}

fn assert_says(changes: &[(usize, &[u8])], text: &str) {
    let said = refused(changes);
    assert!(said.contains(text), "{said:?} should say {text:?}");
}

fn entered(image: &[u8]) -> u32 {
    match boot(image, &memory()).unwrap() {
        BootRegisters::Protected { entry, .. } => entry,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_good_image_is_loaded_and_its_zeros_are_zeros() {
    let memory = memory();
    // As after a reset: memory is full of what was there.
    memory.write_slice(&vec![0xaa; 0x20_0000], GuestAddress(CODE)).unwrap();
    let mut image = kernel(&code());
    // The code's segment has zeros as well, from the middle of a page on.
    put(&mut image, field(0, P_MEMSZ), &0x3001_u64.to_le_bytes());
    let registers = boot(&image, &memory).unwrap();
    let entry = u32::try_from(ENTRY).unwrap();
    assert_eq!(registers, BootRegisters::Protected { entry, start_info: 0x6000 });
    let read = |start, bytes: u64| {
        let mut found = vec![0; usize::try_from(bytes).unwrap()];
        memory.read_slice(&mut found, GuestAddress(start)).unwrap();
        found
    };
    assert!(read(CODE, 5000) == code());
    assert!(read(CODE + 5000, 0x3001 - 5000).iter().all(|byte| *byte == 0));
    assert_eq!(read(CODE + 0x3001, 1), [0xaa]);
    assert!(read(ZEROS, ZEROS_BYTES).iter().all(|byte| *byte == 0));
    assert_eq!((read(ZEROS - 1, 1), read(ZEROS + ZEROS_BYTES, 1)), (vec![0xaa], vec![0xaa]));
}

#[test]
fn the_entrys_note_has_4_or_8_bytes_and_any_place_among_the_notes() {
    let entry = u32::try_from(ENTRY).unwrap();
    assert_eq!(entered(&kernel(&code())), entry);
    let mut long = kernel(&code());
    put(&mut long, NOTE_SIZE, &[8]);
    put(&mut long, field(2, P_FILESZ), &[44]);
    assert_eq!(entered(&long), entry);
    // A second header of notes without it takes nothing back.
    let mut two = kernel(&code());
    let copied = two[field(2, 0)..field(3, 0)].to_vec();
    put(&mut two, field(3, 0), &copied);
    put(&mut two, field(3, P_FILESZ), &[20]);
    put(&mut two, E_PHNUM, &[4]);
    assert_eq!(entered(&two), entry);
    // Aligned to 8 bytes, it begins 4 bytes later.
    let mut aligned = kernel(&code());
    let note = aligned[NOTE_NAME_SIZE..NOTE_VALUE + 4].to_vec();
    put(&mut aligned, NOTE_NAME_SIZE + 4, &note);
    put(&mut aligned, NOTE_NAME_SIZE, &[0; 4]);
    put(&mut aligned, field(2, P_FILESZ), &[44]);
    assert!(boot(&aligned, &memory()).is_err());
    put(&mut aligned, field(2, P_ALIGN), &[8]);
    assert_eq!(entered(&aligned), entry);
}

#[test]
fn an_image_without_the_entry_is_told_how_to_get_it() {
    for change in [
        (NOTE_TYPE, &[17][..]),
        (NOTE_NAME, b"Xem"),
        (NOTE_NAME_SIZE, &[3]),
        (field(2, P_TYPE), &[6]),
        (field(2, P_FILESZ), &[0]),
    ] {
        assert_says(&[change], "no PVH entry (build it with CONFIG_PVH");
    }
}

#[test]
fn images_for_others_are_refused() {
    let others = "not one for 64-bit x86";
    assert_says(&[(4, &[1])], others);
    assert_says(&[(5, &[2])], others);
    assert_says(&[(E_MACHINE, &[183])], others);
}

#[test]
fn an_image_that_is_cut_off_anywhere_is_refused() {
    let image = kernel(&code());
    for cut in 0..image.len() {
        let error = boot(&image[..cut], &memory()).unwrap_err();
        let expected = if cut < 4 {
            matches!(error, BootError::NotAKernel)
        } else {
            matches!(error, BootError::Damaged(_))
        };
        assert!(expected, "cut at {cut}: {error}");
    }
    assert_says(&[(field(0, P_OFFSET), &[1])], "segment 0 lies beyond the end of the file");
}

#[test]
fn program_headers_that_cannot_be_are_refused() {
    assert_says(&[(E_PHOFF, &HUGE)], "ends before its program headers' end");
    assert_says(&[(E_PHOFF, &[0xff; 7])], "ends before its program headers' end");
    assert_says(&[(E_PHNUM, &[0xff; 2])], "65535 program headers of 56 bytes");
    assert_says(&[(E_PHENTSIZE, &[32])], "3 program headers of 32 bytes");
    assert_says(&[(E_PHNUM, &[0])], "no PVH entry");
}

#[test]
fn segments_outside_memory_are_refused() {
    let end = MEMORY - 4999;
    let moved =
        [(field(0, P_PADDR), &end.to_le_bytes()[..]), (NOTE_VALUE, &end.to_le_bytes()[..4])];
    assert_says(&moved, "needs memory up to 0x400001");
    assert_says(&[(field(1, P_PADDR), &(1_u64 << 32).to_le_bytes())], "memory is too small");
    assert_says(&[(field(1, P_MEMSZ), &(1_u64 << 40).to_le_bytes())], "memory is too small");
    assert_says(&[(field(1, P_PADDR), &HUGE)], "no address is so high");
    assert_says(&[(field(1, P_MEMSZ), &HUGE)], "no address is so high");
    // There the boot structures are: what is loaded would be lost.
    assert_says(&[(field(1, P_PADDR), &0x6000_u64.to_le_bytes())], "0x6000, below 1 MiB");
    assert_says(&[(field(1, P_PADDR), &0xf_ffff_u64.to_le_bytes())], "below 1 MiB");
}

#[test]
fn segments_that_overlap_are_refused() {
    let last = CODE + 4999;
    assert_says(
        &[(field(1, P_PADDR), &last.to_le_bytes())],
        "segments at 0x100000 and 0x101387 overlap",
    );
    let touching = (CODE + 5000).to_le_bytes();
    let mut image = kernel(&code());
    put(&mut image, field(1, P_PADDR), &touching);
    entered(&image);
    let around = 0x2_0000_u64.to_le_bytes();
    assert_says(&[(field(0, P_MEMSZ), &around)], "segments at 0x100000 and 0x110000 overlap");
}

#[test]
fn segments_with_sizes_that_cannot_be_are_refused() {
    let more = (1_u64 << 40).to_le_bytes();
    assert_says(&[(field(0, P_FILESZ), &HUGE)], "18446744073709551615 bytes in the file, 5000 in");
    assert_says(&[(field(0, P_MEMSZ), &4999_u64.to_le_bytes())], "5000 bytes in the file, 4999 in");
    let both = [(field(0, P_FILESZ), &HUGE[..]), (field(0, P_MEMSZ), &HUGE)];
    assert_says(&both, "beyond the end of the file");
    let both = [(field(0, P_FILESZ), &more[..]), (field(0, P_MEMSZ), &more)];
    assert_says(&both, "beyond the end of the file");
    assert_says(&[(field(0, P_OFFSET), &HUGE)], "beyond the end of the file");
}

#[test]
fn an_entry_outside_every_segment_is_refused() {
    let end = CODE + 5000;
    for entry in [0, CODE - 1, end, ZEROS, MEMORY, 0xffff_ffff] {
        let text = format!("entry {entry:#x} lies in none of its segments");
        assert_says(&[(NOTE_VALUE, &entry.to_le_bytes()[..4])], &text);
    }
    let mut image = kernel(&code());
    put(&mut image, NOTE_VALUE, &(end - 1).to_le_bytes()[..4]);
    assert_eq!(u64::from(entered(&image)), end - 1);
}

#[test]
fn notes_that_cannot_be_are_refused() {
    for size in [0, 1, 3] {
        assert_says(&[(NOTE_SIZE, &[size])], &format!("has {size} bytes, not 4 or 8"));
    }
    let sized =
        |size: u8, notes: u8| refused(&[(NOTE_SIZE, &[size]), (field(2, P_FILESZ), &[notes])]);
    assert!(sized(5, 44).contains("has 5 bytes, not 4 or 8"));
    assert!(sized(16, 52).contains("has 16 bytes, not 4 or 8"));
    // Too large for the notes.
    for change in [(NOTE_SIZE, &[8][..]), (NOTE_SIZE, &[0xff; 4]), (NOTE_NAME_SIZE, &[0xff; 4])] {
        assert_says(&[change], "last note is cut off");
    }
    assert_says(&[(field(2, P_FILESZ), &[31])], "last note is cut off");
    let high = [(NOTE_SIZE, &[8][..]), (field(2, P_FILESZ), &[44]), (NOTE_VALUE + 4, &[1])];
    assert_says(&high, "beyond 4 GiB");
    assert_says(&[(field(2, P_FILESZ), &HUGE)], "18446744073709551615 bytes of notes");
    assert_says(&[(field(2, P_OFFSET), &HUGE)], "ends before its notes' end");
    let end = (CODE_OFFSET as u64 + 4990).to_le_bytes();
    assert_says(&[(field(2, P_OFFSET), &end)], "ends before its notes' end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the headers and notes say: no panic, and what is accepted begins in memory that
    /// was loaded from the file.
    #[test]
    fn random_headers_do_no_harm(
        changes in proptest::collection::vec(
            (prop_oneof![16..64_usize, 64..field(3, 0), NOTE_NAME_SIZE - 20..NOTE_VALUE + 8],
             prop_oneof![Just(0_u8), Just(1), Just(0xff), any::<u8>()]), 1..6),
    ) {
        let mut image = kernel(&code());
        for (at, byte) in changes {
            image[at] = byte;
        }
        let memory = memory();
        if let Ok(BootRegisters::Protected { entry, .. }) = boot(&image, &memory) {
            let entry = u64::from(entry);
            prop_assert!((layout::HIGH_MEMORY..MEMORY).contains(&entry), "{entry:#x}");
        }
    }
}
