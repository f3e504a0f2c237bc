//! How the CA's key is kept: encrypted in the replicated store, under a key that is on each member's
//! disk (`sealing.key`) and nowhere in the store, its log, its snapshots or a backup.
//!
//! ChaCha20-Poly1305 with a random nonce. What goes with the key is bound to it: the cluster's id,
//! the path of the record and the CA's certificate. So a record that was changed, or comes from
//! elsewhere, is refused, and never signed with.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Ca;
use super::files::write_private;

/// The file in the data folder.
pub(crate) const SEALING_KEY: &str = "sealing.key";
const KEY_LEN: usize = 32;
/// A file that is longer is none of ours.
const FILE_MAX: u64 = 1024;
/// Others than the owner can do something with a file.
const OTHERS: u32 = 0o077;

/// The key that seals the CA's key: the same on all members. Wiped from memory after its use.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SealingKey(Zeroizing<[u8; KEY_LEN]>);

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealingKey").finish_non_exhaustive()
    }
}

/// Why a node cannot use the CA's key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    /// There is no file, or it cannot be read.
    #[error("{} cannot be read ({source})", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Whoever else can read it may have done so.
    #[error("{} may be read by others than this agent's user (owner {owner}, mode {mode:03o})", path.display())]
    Exposed { path: PathBuf, owner: u32, mode: u32 },
    /// It holds something else than a key.
    #[error("{} is damaged", .0.display())]
    Damaged(PathBuf),
    /// It does not fit.
    #[error(
        "the CA's key in the store cannot be decrypted with this node's {SEALING_KEY}: one of them is damaged, or of another cluster"
    )]
    Refused,
    /// Nothing could be encrypted.
    #[error("the system has no randomness, or the cipher failed")]
    Cipher,
}

impl SealingKey {
    /// A new one.
    pub(crate) fn make() -> Result<Self, getrandom::Error> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        getrandom::fill(key.as_mut_slice())?;
        Ok(Self(key))
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Zeroizing::new).map(Self)
    }

    /// For a node that joins, over TLS.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_slice()
    }

    /// Reads a data folder's.
    pub(crate) fn load(folder: &Path) -> Result<Self, SealError> {
        let path = folder.join(SEALING_KEY);
        let unreadable = |source| SealError::Unreadable { path: path.clone(), source };
        let file = File::open(&path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o777);
        if mode & OTHERS != 0 || owner != nix::unistd::geteuid().as_raw() {
            return Err(SealError::Exposed { path, owner, mode });
        }
        let mut text = Zeroizing::new(Vec::new());
        file.take(FILE_MAX).read_to_end(&mut text).map_err(unreadable)?;
        let key = STANDARD.decode(text.trim_ascii()).ok().map(Zeroizing::new);
        let key = key.and_then(|key| Self::from_bytes(&key));
        key.ok_or(SealError::Damaged(path))
    }

    /// Writes it so that it is there wholly or not at all, for the owner alone.
    pub(crate) fn store(&self, folder: &Path) -> io::Result<()> {
        let mut text = Zeroizing::new(STANDARD.encode(self.bytes()));
        text.push('\n');
        write_private(&folder.join(SEALING_KEY), text.as_bytes())
    }

    fn cipher(&self) -> Result<LessSafeKey, SealError> {
        let key =
            UnboundKey::new(&CHACHA20_POLY1305, self.bytes()).map_err(|_| SealError::Cipher)?;
        Ok(LessSafeKey::new(key))
    }
}

/// A CA as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SealedCa {
    /// Its certificate, PEM.
    pub(crate) certificate_pem: String,
    /// Nonce, ciphertext and tag of its key (PKCS #8), base64.
    sealed_key: String,
}

/// What a sealed key is bound to.
fn bound_to(cluster_id: &str, path: &str, certificate_pem: &str) -> Vec<u8> {
    // No cluster's id and no path holds a line's end.
    format!("holdfast CA key\n{cluster_id}\n{path}\n{certificate_pem}").into_bytes()
}

impl SealedCa {
    /// Encrypts a CA's key for the record at `path`.
    pub(crate) fn seal(
        ca: &Ca,
        key: &SealingKey,
        cluster_id: &str,
        path: &str,
    ) -> Result<Self, SealError> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).map_err(|_| SealError::Cipher)?;
        let bound = bound_to(cluster_id, path, &ca.certificate_pem);
        // Encrypted where it is: room for the tag, so that the clear key is not left behind elsewhere.
        let mut sealed =
            Zeroizing::new(Vec::with_capacity(ca.key_der.len() + CHACHA20_POLY1305.tag_len()));
        sealed.extend_from_slice(&ca.key_der);
        key.cipher()?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(bound),
                &mut *sealed,
            )
            .map_err(|_| SealError::Cipher)?;
        let sealed_key = STANDARD.encode([&nonce, sealed.as_slice()].concat());
        Ok(Self { certificate_pem: ca.certificate_pem.clone(), sealed_key })
    }

    /// Decrypts it.
    pub(crate) fn open(
        &self,
        key: &SealingKey,
        cluster_id: &str,
        path: &str,
    ) -> Result<Ca, SealError> {
        let sealed = STANDARD.decode(&self.sealed_key).map_err(|_| SealError::Refused)?;
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Refused)?;
        let bound = bound_to(cluster_id, path, &self.certificate_pem);
        let mut sealed = Zeroizing::new(sealed.to_vec());
        let clear = key
            .cipher()?
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(bound), &mut sealed)
            .map_err(|_| SealError::Refused)?;
        let key_der = Zeroizing::new(clear.to_vec());
        Ok(Ca { key_der, certificate_pem: self.certificate_pem.clone() })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_sealed_key_opens_where_it_belongs_and_nowhere_else() -> Outcome {
        let (ca, other) = (Ca::make("c1")?, Ca::make("c1")?);
        let (key, wrong) = (SealingKey::make()?, SealingKey::make()?);
        let sealed = SealedCa::seal(&ca, &key, "c1", "priv/ca")?;
        let opened = sealed.open(&key, "c1", "priv/ca")?;
        assert_eq!(opened.key_der, ca.key_der);
        let again = SealedCa::seal(&ca, &key, "c1", "priv/ca")?;
        assert_ne!(sealed.sealed_key, again.sealed_key, "a nonce was used twice");

        let refused = |sealed: &SealedCa, key: &SealingKey, id: &str, path: &str| {
            matches!(sealed.open(key, id, path), Err(SealError::Refused))
        };
        assert!(refused(&sealed, &wrong, "c1", "priv/ca"), "another key");
        assert!(refused(&sealed, &key, "c2", "priv/ca"), "another cluster");
        assert!(refused(&sealed, &key, "c1", "priv/cb"), "another place");
        let certificate_pem = other.certificate_pem.clone();
        let swapped = SealedCa { certificate_pem, ..sealed.clone() };
        assert!(refused(&swapped, &key, "c1", "priv/ca"), "another certificate");
        // Every bit of nonce, ciphertext and tag counts.
        let bytes = STANDARD.decode(&sealed.sealed_key)?;
        for place in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[place] ^= 1 << (place % 8);
            let tampered = SealedCa { sealed_key: STANDARD.encode(bytes), ..sealed.clone() };
            assert!(refused(&tampered, &key, "c1", "priv/ca"), "byte {place}");
        }
        for short in ["", "AAAA", "no base64!", &sealed.sealed_key[..40]] {
            let cut = SealedCa { sealed_key: short.to_owned(), ..sealed.clone() };
            assert!(refused(&cut, &key, "c1", "priv/ca"), "{short}");
        }
        Ok(())
    }

    #[test]
    fn a_key_file_is_for_its_owner_alone_and_whole() -> Outcome {
        let folder = tempfile::tempdir()?;
        let (folder, path) = (folder.path(), folder.path().join(SEALING_KEY));
        let said = |folder: &Path| match SealingKey::load(folder) {
            Ok(_) => "nothing".to_owned(),
            Err(error) => error.to_string(),
        };
        assert!(said(folder).contains("cannot be read"), "{}", said(folder));
        let key = SealingKey::make()?;
        key.store(folder)?;
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        assert!(SealingKey::load(folder)? == key);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
        assert!(said(folder).contains("mode 640"), "{}", said(folder));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let text = fs::read_to_string(&path)?;
        for bad in ["", "AAAA", "!", &text[..text.len() - 4], &text.repeat(20)] {
            fs::write(&path, bad)?;
            assert!(said(folder).contains("is damaged"), "{bad}: {}", said(folder));
        }
        Ok(())
    }
}
