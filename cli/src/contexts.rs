//! The user's contexts: which clusters there are, where, and the key to talk to each. Kept in
//! `$HOLDFAST_CONFIG_DIR`, else `$XDG_CONFIG_HOME/holdfast`, else `~/.config/holdfast`:
//! `config.toml`, and a folder with keys for each context made by `create-admin`.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure};

/// All contexts, and the one in use.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contexts {
    /// What commands use if they are not told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    #[serde(default)]
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// One cluster, and who we are there. Paths are absolute, or relative to the folder of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// `host:port` of each node's API, tried in order.
    pub(crate) addresses: Vec<String>,
    /// The certificates of the cluster's CA, PEM: one, or two while it is rotated.
    pub(crate) ca: PathBuf,
    /// Our certificate, PEM.
    pub(crate) certificate: PathBuf,
    /// Its key, PEM.
    pub(crate) key: PathBuf,
}

/// The folder of the configuration.
pub(crate) fn folder() -> Result<PathBuf, Failure> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = from("HOLDFAST_CONFIG_DIR") {
        return Ok(folder.into());
    }
    if let Some(config) = from("XDG_CONFIG_HOME") {
        return Ok(PathBuf::from(config).join("holdfast"));
    }
    match from("HOME") {
        Some(home) => Ok(PathBuf::from(home).join(".config/holdfast")),
        None => Err(Failure::new(Exit::Usage, "cannot find the folder for contexts")
            .why("neither HOLDFAST_CONFIG_DIR, XDG_CONFIG_HOME nor HOME is set")),
    }
}

impl Contexts {
    /// Reads the contexts of a folder; a missing file is none.
    pub(crate) fn load(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join("config.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(Failure::file("read", &path, &error)),
        };
        toml::from_str(&text).map_err(|error| {
            Failure::new(Exit::Usage, format!("cannot read {}", path.display()))
                .why(error.to_string())
                .remedy("mend the file, or remove it and make the contexts again")
        })
    }

    /// Writes the contexts, whole or not at all.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), Failure> {
        let text = toml::to_string_pretty(self).map_err(|error| {
            Failure::new(Exit::Failed, "cannot write the contexts").why(error.to_string())
        })?;
        write_private(&folder.join("config.toml"), text.as_bytes())
    }

    /// The context of a name.
    pub(crate) fn get(&self, name: &str) -> Result<&Context, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let known: Vec<_> = self.contexts.keys().map(String::as_str).collect();
            let why = if known.is_empty() {
                "there are no contexts".to_owned()
            } else {
                format!("there are: {}", known.join(", "))
            };
            Failure::new(Exit::NotFound, format!("there is no context `{name}`"))
                .why(why)
                .remedy("make one with `clusterctl context create-admin` on a node, or `clusterctl context add`")
        })
    }
}

/// Writes a file that only its owner can read, by way of a temporary one in the same folder.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|error| Failure::file("write", path, &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn contexts_round_trip_in_a_private_file() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("deeper");
        assert!(Contexts::load(&folder).unwrap().contexts.is_empty());
        let context = Context {
            addresses: vec!["a:7400".into(), "b:7400".into()],
            ca: "lab/ca.pem".into(),
            certificate: "lab/cert.pem".into(),
            key: "lab/key.pem".into(),
        };
        let contexts =
            Contexts { current: Some("lab".into()), contexts: [("lab".into(), context)].into() };
        contexts.store(&folder).unwrap();
        let read = Contexts::load(&folder).unwrap();
        assert_eq!(read.current.as_deref(), Some("lab"));
        assert_eq!(read.get("lab").unwrap().addresses.len(), 2);
        let mode = std::fs::metadata(folder.join("config.toml")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let missing = read.get("prod").unwrap_err();
        assert_eq!(missing.exit, Exit::NotFound);
        assert!(missing.to_string().contains("there are: lab"));
    }

    #[test]
    fn a_damaged_file_names_the_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), "current = 3\n").unwrap();
        let failure = Contexts::load(folder.path()).unwrap_err();
        assert!(failure.to_string().contains("line 1"), "{failure}");
    }
}
