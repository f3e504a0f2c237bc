//! The settings of the whole cluster that the leader keeps to: `cluster.toml` as the store has it at
//! that moment. So a new leader decides by nothing older, not even for its first second: it would
//! give up history that is to be kept, or refuse what is allowed.

use std::io;
use std::time::Duration;

use proto::document::parse;
use proto::documents::ClusterDocument;
use proto::keys;

use crate::machine::{DataLimits, Read, Record, Table, Usage, decode, limits};
use crate::{ClusterConfig, Limits, Retention};

/// What is kept, and how much there may be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) retention: Retention,
    pub(super) limits: DataLimits,
}

impl Settings {
    /// Where there is no document, this member's own configuration holds. One that cannot be read
    /// (a newer version's) changes no limit, and nothing that people wrote is given up for its age.
    pub(super) fn read(read: &impl Read, config: &ClusterConfig) -> io::Result<Self> {
        let own = Self { retention: config.retention, limits: data_limits(&config.limits) };
        let Some(row) = read.get(Table::Data, keys::CLUSTER_DOCUMENT.as_bytes())? else {
            return Ok(own);
        };
        let record: Record = decode(&row)?;
        let text = String::from_utf8_lossy(&record.value);
        match parse::<ClusterDocument>(&text) {
            Ok(document) => Ok(Self::of(&document, config)),
            Err(error) => {
                tracing::debug!(%error, "the cluster's settings cannot be read");
                let retention = Retention { file_age: Duration::MAX, ..own.retention };
                Ok(Self { retention, limits: limits(read)?.unwrap_or(own.limits) })
            }
        }
    }

    fn of(document: &ClusterDocument, config: &ClusterConfig) -> Self {
        let ClusterDocument { history, limits, .. } = document;
        Self {
            retention: Retention {
                file_versions: history.versions,
                file_age: Duration::from_millis(history.age.as_ms()),
                ..config.retention
            },
            limits: DataLimits {
                files: Usage { keys: limits.files, bytes: limits.files_size.0 },
                system: Usage { keys: limits.records, bytes: limits.records_size.0 },
                largest_file: limits.largest_file.0,
            },
        }
    }
}

fn data_limits(limits: &Limits) -> DataLimits {
    DataLimits {
        files: Usage { keys: limits.files, bytes: limits.file_bytes },
        system: Usage { keys: limits.records, bytes: limits.record_bytes },
        largest_file: limits.largest_file_bytes,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::machine::encode;

    /// A store with these rows of data, and limits that were set.
    struct Rows(BTreeMap<Vec<u8>, Vec<u8>>);

    impl Read for Rows {
        fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
            let wanted = matches!(table, Table::Data | Table::Machine);
            Ok(self.0.get(key).filter(|_| wanted).cloned())
        }
        fn scan(
            &self,
            _: Table,
            _: &[u8],
            _: Option<&[u8]>,
            _: usize,
        ) -> io::Result<Vec<crate::machine::Row>> {
            Ok(Vec::new())
        }
        fn scan_back(
            &self,
            _: Table,
            _: &[u8],
            _: &[u8],
            _: usize,
        ) -> io::Result<Vec<crate::machine::Row>> {
            Ok(Vec::new())
        }
    }

    fn read(document: Option<&str>, set: Option<DataLimits>) -> Settings {
        let mut rows = BTreeMap::new();
        if let Some(text) = document {
            let value = text.as_bytes().to_vec();
            let record = Record { create_revision: 1, mod_revision: 1, ordinal: 1, value };
            rows.insert(keys::CLUSTER_DOCUMENT.as_bytes().to_vec(), encode(&record).unwrap());
        }
        if let Some(set) = set {
            rows.insert(b"limits".to_vec(), encode(&set).unwrap());
        }
        let config = ClusterConfig::new("/nowhere".into(), String::new(), String::new());
        Settings::read(&Rows(rows), &config).unwrap()
    }

    #[test]
    fn the_documents_defaults_are_those_of_a_member() {
        let own = read(None, None);
        assert_eq!(read(Some("# nothing is set\n"), None), own);
        assert_eq!(own.retention, Retention::default());
        assert_eq!(own.limits, data_limits(&Limits::default()));
    }

    #[test]
    fn what_the_document_says_holds_at_once() {
        let text = "[history]\nversions = 7\nage = \"1h\"\n[limits]\nfiles = 200\n\
                    files_size = \"2MiB\"\nlargest_file = \"4KiB\"\nrecords = 3000\n";
        let set = read(Some(text), None);
        assert_eq!(set.retention.file_versions, 7);
        assert_eq!(set.retention.file_age, Duration::from_secs(3600));
        assert_eq!(set.retention.system_revisions, Retention::default().system_revisions);
        assert_eq!(set.limits.files, Usage { keys: 200, bytes: 2 << 20 });
        assert_eq!((set.limits.largest_file, set.limits.system.keys), (4096, 3000));
    }

    #[test]
    fn an_unreadable_document_changes_no_limit_and_gives_up_no_history() {
        let before = read(Some("[limits]\nfiles = 200\n"), None).limits;
        for text in ["of = \"a newer version\"\n", "x = ["] {
            let kept = read(Some(text), Some(before));
            assert_eq!((kept.limits, kept.retention.file_age), (before, Duration::MAX), "{text}");
        }
    }
}
