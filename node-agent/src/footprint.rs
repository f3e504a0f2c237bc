//! What a witness takes of a machine's memory. It may be a small one that does something else, and of
//! the program's text, most of what is mapped was needed at the start alone.

use std::io;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(60);

/// Lets go of program text that was not needed lately, for as long as the agent runs. What is needed
/// again comes back from the kernel's page cache, or the file.
///
/// Not for a node with VMs: where its disk hangs, what keeps the lease and ends VMs is to be in
/// memory.
pub async fn keep_small() {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + EVERY, EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = let_go_of_text() {
            tracing::debug!("program text stays in memory: {error}");
        }
    }
}

/// Where a mapping of memory begins, and its length, bytes.
type Mapping = (usize, usize);

/// Unmaps the pages of this program's text. `madvise(2)`, `MADV_DONTNEED`.
fn let_go_of_text() -> io::Result<Mapping> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let here = let_go_of_text as fn() -> io::Result<Mapping> as usize;
    let (begin, length) = text_around(&maps, here)
        .ok_or_else(|| io::Error::other("the kernel does not say where it is mapped"))?;
    let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(begin);
    // SAFETY: the kernel named this range as one mapping of a file that is not written to, so that
    // none of its pages has anything that the file has not: each is read from there again by whoever
    // touches it. No memory of Rust's lies in it.
    if unsafe { libc::madvise(address, length, libc::MADV_DONTNEED) } == 0 {
        Ok((begin, length))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The mapping that holds an address, where it is executable, private, and of a file; as
/// proc_pid_maps(5) shows it.
fn text_around(maps: &str, address: usize) -> Option<Mapping> {
    maps.lines().find_map(|line| {
        let mut parts = line.split_whitespace();
        let (range, permissions) = (parts.next()?, parts.next()?);
        let (begin, end) = range.split_once('-')?;
        let begin = usize::from_str_radix(begin, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        let of_a_file = parts.nth(3).is_some_and(|path| path.starts_with('/'));
        let found = (begin..end).contains(&address) && permissions == "r-xp" && of_a_file;
        found.then_some((begin, end - begin))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0200000 r--p 00000000 fe:00 123 /usr/bin/node-agent
55d0c0200000-55d0c1000000 r-xp 00200000 fe:00 123 /usr/bin/node-agent (deleted)
55d0c1000000-55d0c1100000 rw-p 01000000 fe:00 123 /usr/bin/node-agent
7f0000000000-7f0000001000 r-xp 00000000 00:00 0
7f0000001000-7f0000002000 rwxp 00000000 fe:00 9 /usr/lib/odd.so
";

    #[test]
    fn only_text_that_a_file_has_is_found() {
        assert_eq!(text_around(MAPS, 0x55d0_c020_0000), Some((0x55d0_c020_0000, 0xe0_0000)));
        assert_eq!(text_around(MAPS, 0x55d0_c0ff_ffff), Some((0x55d0_c020_0000, 0xe0_0000)));
        for other in [0, 0x55d0_c000_0000, 0x55d0_c100_0000, 0x7f00_0000_0000, 0x7f00_0000_1000] {
            assert_eq!(text_around(MAPS, other), None, "{other:x}");
        }
        assert_eq!(text_around("not a map", 1), None);
    }

    /// Kilobytes of a mapping that are in memory.
    fn resident(begin: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of = smaps.split_once(&format!("{begin:x}-")).unwrap().1;
        let line = of.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn the_programs_text_leaves_memory_and_the_program_goes_on() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let here = let_go_of_text as fn() -> io::Result<Mapping> as usize;
        let (begin, length) = text_around(&maps, here).unwrap();
        // All of it is there.
        let all = std::ptr::with_exposed_provenance::<u8>(begin);
        for page in (0..length).step_by(4096) {
            // SAFETY: it is within a readable mapping of this program.
            std::hint::black_box(unsafe { all.add(page).read_volatile() });
        }
        let before = resident(begin);
        assert_eq!(let_go_of_text().unwrap(), (begin, length));
        let after = resident(begin);
        assert!(after < before / 2, "{before} kB before, {after} kB after");
    }
}
