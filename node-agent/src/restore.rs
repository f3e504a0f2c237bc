//! `cluster restore`: the backup as it comes in, kept in a file without a name until all of it is
//! here. What is in it is judged by the cluster.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use proto::v1::{RestoreNames, RestoreRequest};
use tonic::{Status, Streaming};

/// Takes a backup in; it is gone with the file's last handle, whatever happens.
pub(crate) async fn receive(
    folder: &Path,
    mut chunks: Streaming<RestoreRequest>,
) -> Result<(RestoreNames, File), Status> {
    let first = chunks.message().await?.and_then(|first| first.names);
    let names = first.ok_or_else(|| Status::invalid_argument("the names must come first"))?;
    let disk = |error: std::io::Error| {
        Status::resource_exhausted(format!(
            "the backup cannot be kept in {} while it is checked: {error}; nothing was changed: free some room there and try again",
            folder.display()
        ))
    };
    let mut file = nameless(folder).map_err(disk)?;
    while let Some(chunk) = chunks.message().await? {
        let written = tokio::task::spawn_blocking(move || {
            file.write_all(&chunk.data)?;
            Ok(file)
        });
        let written = written.await.map_err(|error| Status::internal(error.to_string()))?;
        file = written.map_err(disk)?;
    }
    Ok((names, file))
}

/// A file that only this process has. There are secrets in it.
fn nameless(folder: &Path) -> std::io::Result<File> {
    let path = folder.join(format!("restoring-{}", std::process::id()));
    // What an agent left that ended between the two calls below.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    match std::fs::remove_file(&path) {
        // Another restore that begins at the same moment took it for such a remainder.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;

    #[test]
    fn what_is_received_has_no_name_and_is_not_shared() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (mut one, mut two) = (nameless(folder.path())?, nameless(folder.path())?);
        assert_eq!(std::fs::read_dir(folder.path())?.count(), 0);
        one.write_all(b"one")?;
        two.write_all(b"two")?;
        one.rewind()?;
        let mut text = String::new();
        one.read_to_string(&mut text)?;
        assert_eq!(text, "one");
        Ok(())
    }
}
