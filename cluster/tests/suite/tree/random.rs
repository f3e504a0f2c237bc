//! Random operations against a model in memory, and random writes into one file (as `fsx` does).
//! `HOLDFAST_TREE_OPERATIONS` sets how many, `HOLDFAST_TREE_SEED` repeats a run.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use nix::errno::Errno;

use super::harness::{Mounted, can_mount, close, create, errno, names, open, wait, write};
use crate::common::Outcome;

/// Small and repeatable (Steele, Lea and Flood's SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % below.max(1) as u64).unwrap_or(0)
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What is at a path of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    File(Vec<u8>),
    Folder,
}

/// A file system in memory, with the errors of a real one.
struct Model(BTreeMap<String, Thing>);

impl Model {
    fn parent_is_folder(&self, path: &str) -> Result<(), Errno> {
        let Some((parent, _)) = path.rsplit_once('/') else { return Ok(()) };
        // The nearest that exists decides: a file on the way is no folder.
        let mut at = String::new();
        for part in parent.split('/') {
            at = if at.is_empty() { part.to_owned() } else { format!("{at}/{part}") };
            match self.0.get(&at) {
                Some(Thing::Folder) => {}
                Some(Thing::File(_)) => return Err(Errno::ENOTDIR),
                None => return Err(Errno::ENOENT),
            }
        }
        Ok(())
    }
    fn get(&self, path: &str) -> Result<&Thing, Errno> {
        self.parent_is_folder(path)?;
        self.0.get(path).ok_or(Errno::ENOENT)
    }
    fn has_children(&self, path: &str) -> bool {
        let prefix = format!("{path}/");
        self.0.range(prefix.clone()..).next().is_some_and(|(key, _)| key.starts_with(&prefix))
    }
    fn write(&mut self, path: &str, content: &[u8]) -> Result<(), Errno> {
        self.parent_is_folder(path)?;
        match self.0.get(path) {
            Some(Thing::Folder) => Err(Errno::EISDIR),
            _ => {
                self.0.insert(path.to_owned(), Thing::File(content.to_vec()));
                Ok(())
            }
        }
    }
    fn create_new(&mut self, path: &str) -> Result<(), Errno> {
        self.parent_is_folder(path)?;
        if self.0.contains_key(path) {
            return Err(Errno::EEXIST);
        }
        self.write(path, b"")
    }
    fn append(&mut self, path: &str, content: &[u8]) -> Result<(), Errno> {
        let mut all = match self.get(path) {
            Ok(Thing::File(present)) => present.clone(),
            Ok(Thing::Folder) => return Err(Errno::EISDIR),
            Err(Errno::ENOENT) => Vec::new(),
            Err(error) => return Err(error),
        };
        all.extend_from_slice(content);
        self.write(path, &all)
    }
    fn truncate(&mut self, path: &str, size: usize) -> Result<(), Errno> {
        let Thing::File(present) = self.get(path)? else { return Err(Errno::EISDIR) };
        let mut content = present.clone();
        content.resize(size, 0);
        self.write(path, &content)
    }
    fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        self.parent_is_folder(path)?;
        if self.0.contains_key(path) {
            return Err(Errno::EEXIST);
        }
        self.0.insert(path.to_owned(), Thing::Folder);
        Ok(())
    }
    fn unlink(&mut self, path: &str) -> Result<(), Errno> {
        match self.get(path)? {
            Thing::Folder => Err(Errno::EISDIR),
            Thing::File(_) => {
                self.0.remove(path);
                Ok(())
            }
        }
    }
    fn rmdir(&mut self, path: &str) -> Result<(), Errno> {
        match self.get(path)? {
            Thing::File(_) => Err(Errno::ENOTDIR),
            Thing::Folder if self.has_children(path) => Err(Errno::ENOTEMPTY),
            Thing::Folder => {
                self.0.remove(path);
                Ok(())
            }
        }
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        self.parent_is_folder(from)?;
        self.parent_is_folder(to)?;
        let moving = self.get(from)?.clone();
        // The kernel looks at the paths' relation before it looks at what is there.
        if to.starts_with(&format!("{from}/")) {
            return Err(Errno::EINVAL);
        }
        if from.starts_with(&format!("{to}/")) {
            return Err(Errno::ENOTEMPTY);
        }
        if from == to {
            return Ok(());
        }
        match (&moving, self.0.get(to)) {
            (Thing::File(_), Some(Thing::Folder)) => return Err(Errno::EISDIR),
            (Thing::Folder, Some(Thing::File(_))) => return Err(Errno::ENOTDIR),
            (Thing::Folder, Some(Thing::Folder)) if self.has_children(to) => {
                return Err(Errno::ENOTEMPTY);
            }
            _ => {}
        }
        let prefix = format!("{from}/");
        let inside: Vec<String> = self
            .0
            .range(prefix.clone()..)
            .map(|(key, _)| key.clone())
            .take_while(|key| key.starts_with(&prefix))
            .collect();
        for key in inside {
            if let Some(thing) = self.0.remove(&key) {
                self.0.insert(format!("{to}{}", &key[from.len()..]), thing);
            }
        }
        self.0.remove(from);
        self.0.insert(to.to_owned(), moving);
        Ok(())
    }
    fn list(&self, path: &str) -> Result<Vec<String>, Errno> {
        match self.get(path)? {
            Thing::File(_) => Err(Errno::ENOTDIR),
            Thing::Folder => {
                let prefix = format!("{path}/");
                let inside = self.0.range(prefix.clone()..);
                let inside = inside.take_while(|(key, _)| key.starts_with(&prefix));
                let names = inside.filter_map(|(key, _)| {
                    let rest = &key[prefix.len()..];
                    (!rest.contains('/')).then(|| rest.to_owned())
                });
                Ok(names.collect())
            }
        }
    }
}

/// One that is there, or any.
fn path(model: &Model, random: &mut Random) -> String {
    if random.next(2) == 0 && !model.0.is_empty() {
        let at = random.next(model.0.len());
        return model.0.keys().nth(at).cloned().unwrap_or_default();
    }
    let names = ["a", "b", "c", "d.toml"];
    let depth = [1, 1, 1, 1, 2, 2, 2, 3][random.next(8)];
    (0..depth).map(|_| names[random.next(names.len())]).collect::<Vec<_>>().join("/")
}

fn system<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| errno(&error))
}

/// One operation on both; what they answered.
fn step(
    tree: &Mounted,
    model: &mut Model,
    random: &mut Random,
) -> (String, Result<(), Errno>, Result<(), Errno>) {
    let (one, two) = (path(model, random), path(model, random));
    // Under a folder of its own: the top has what every cluster has.
    let at = |path: &str| tree.path(&format!("work/{path}"));
    let content = vec![b'a' + u8::try_from(random.next(26)).unwrap_or(0); random.next(3000)];
    let size = random.next(4000);
    match random.next(13) {
        0 | 1 => {
            let real = write(&at(&one), &content);
            (format!("write {one} {}", content.len()), real, model.write(&one, &content))
        }
        2 => {
            let real = system(create(&at(&one), libc::O_EXCL)).and_then(close);
            // A document appears when the kernel lets go of it, not when it is closed.
            if real.is_ok() {
                wait("it is saved", || at(&one).exists());
            }
            (format!("create {one}"), real, model.create_new(&one))
        }
        3 | 4 => {
            let file = system(create(&at(&one), libc::O_APPEND));
            let real = file.and_then(|file| {
                system(std::io::Write::write_all(&mut &file, &content))?;
                close(file)
            });
            (format!("append {one} {}", content.len()), real, model.append(&one, &content))
        }
        5 => {
            let real = nix::unistd::truncate(&at(&one), i64::try_from(size).unwrap_or(0));
            (format!("truncate {one} {size}"), real, model.truncate(&one, size))
        }
        6 | 12 => (format!("mkdir {one}"), system(fs::create_dir(at(&one))), model.mkdir(&one)),
        7 => (format!("unlink {one}"), system(fs::remove_file(at(&one))), model.unlink(&one)),
        8 => (format!("rmdir {one}"), system(fs::remove_dir(at(&one))), model.rmdir(&one)),
        9 | 10 => {
            let real = system(fs::rename(at(&one), at(&two)));
            (format!("rename {one} {two}"), real, model.rename(&one, &two))
        }
        _ => match (system(names(&at(&one))), model.list(&one)) {
            (Ok(real), Ok(wanted)) => {
                assert_eq!(real, wanted, "list {one}");
                (format!("list {one}"), Ok(()), Ok(()))
            }
            (real, wanted) => (format!("list {one}"), real.map(drop), wanted.map(drop)),
        },
    }
}

/// Everything below a folder, read.
fn contents(at: &std::path::Path, prefix: &str, into: &mut BTreeMap<String, Thing>) -> Outcome {
    for name in names(at)? {
        let (path, key) = (at.join(&name), format!("{prefix}{name}"));
        if path.is_dir() {
            into.insert(key.clone(), Thing::Folder);
            contents(&path, &format!("{key}/"), into)?;
        } else {
            into.insert(key, Thing::File(fs::read(&path)?));
        }
    }
    Ok(())
}

#[test]
fn random_operations_do_what_they_do_in_a_model() -> Outcome {
    if !can_mount("random_operations_do_what_they_do_in_a_model") {
        return Ok(());
    }
    let operations = setting("HOLDFAST_TREE_OPERATIONS", 4_000);
    let seed = setting("HOLDFAST_TREE_SEED", u64::from(std::process::id()));
    println!("seed {seed}, {operations} operations");
    let tree = Mounted::new(1)?;
    fs::create_dir(tree.path("work"))?;
    let (mut model, mut random) = (Model(BTreeMap::new()), Random(seed));
    let begin = Instant::now();
    let (mut fine, mut trace) = (0u64, Vec::new());
    for number in 0..operations {
        let (what, real, wanted) = step(&tree, &mut model, &mut random);
        trace.push(format!("{what}: {real:?}"));
        let recent = &trace[trace.len().saturating_sub(15)..];
        assert_eq!(real, wanted, "seed {seed}, operation {number}:\n{}", recent.join("\n"));
        fine += u64::from(real.is_ok());
        if number % 500 == 499 || number + 1 == operations {
            let mut real = BTreeMap::new();
            contents(&tree.path("work"), "", &mut real)?;
            assert_eq!(real, model.0, "seed {seed}, after operation {number}");
        }
    }
    println!("{operations} operations in {:?}, {fine} of them without an error", begin.elapsed());
    assert!(fine > operations / 4, "too few succeed to test anything: {fine}");
    // What the memory says is what the store has.
    let mut tree = tree;
    tree.unmount(0);
    tree.mount(0)?;
    let mut real = BTreeMap::new();
    contents(&tree.path("work"), "", &mut real)?;
    assert_eq!(real, model.0, "seed {seed}, mounted again");
    Ok(())
}

#[test]
fn random_writes_into_one_file_leave_what_they_must() -> Outcome {
    if !can_mount("random_writes_into_one_file_leave_what_they_must") {
        return Ok(());
    }
    const LARGEST: usize = 60_000;
    let operations = setting("HOLDFAST_TREE_OPERATIONS", 2_000);
    let seed = setting("HOLDFAST_TREE_SEED", u64::from(std::process::id()));
    println!("seed {seed}, {operations} operations");
    let tree = Mounted::new(1)?;
    let path = tree.path("fsx");
    write(&path, b"")?;
    let (mut model, mut random) = (Vec::<u8>::new(), Random(seed));
    let mut file = open(&path, true, 0)?;
    for number in 0..operations {
        let (offset, length) = (random.next(LARGEST), random.next(20_000));
        let end = (offset + length).min(LARGEST);
        let context = || format!("seed {seed}, operation {number}, {offset}..{end}");
        match random.next(8) {
            0..=2 => {
                let bytes: Vec<u8> = (offset..end)
                    .map(|at| u8::try_from((at as u64 + number) % 251).unwrap_or(0))
                    .collect();
                file.write_all_at(&bytes, offset as u64)?;
                if end > model.len() && end > offset {
                    model.resize(end, 0);
                }
                if end > offset {
                    model[offset..end].copy_from_slice(&bytes);
                }
            }
            3..=5 => {
                let mut bytes = vec![0; end - offset];
                let read = file.read_at(&mut bytes, offset as u64)?;
                let from = offset.min(model.len());
                assert_eq!(
                    &bytes[..read],
                    &model[from..end.min(model.len()).max(from)],
                    "{}",
                    context()
                );
            }
            6 if random.next(4) == 0 => {
                file.set_len(offset as u64)?;
                model.resize(offset, 0);
            }
            6 => file.sync_all()?,
            _ => {
                close(file)?;
                file = open(&path, true, 0)?;
                assert_eq!(file.metadata()?.len(), model.len() as u64, "{}", context());
            }
        }
    }
    close(file)?;
    assert!(fs::read(&path)? == model, "seed {seed}: the content differs at the end");
    Ok(())
}
