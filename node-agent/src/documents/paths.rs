//! What of a path concerns the other files.

/// Largest file, bytes.
pub(super) const FILE_MAX: usize = 1 << 20;
/// Most files in one commit.
pub(super) const CHANGES_MAX: usize = 4096;

/// The folders above a path, the outermost first: `a` and `a/b` of `a/b/c`.
pub(super) fn above(path: &str) -> impl Iterator<Item = &str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    path.match_indices('/').map(|(at, _)| &path[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_lie_above_a_path() {
        assert_eq!(above("a/b/c").collect::<Vec<_>>(), ["a", "a/b"]);
        assert_eq!(above("a/b/").collect::<Vec<_>>(), ["a"]);
        assert_eq!(above("a").count(), 0);
    }
}
