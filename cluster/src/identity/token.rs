//! Join tokens: `hf1-` and base64url of what a joining node needs to find and trust the cluster.
//!
//! The cluster keeps only a hash of the secret ([`TokenRecord`], under `priv/tokens/ID`).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use serde::{Deserialize, Serialize};

use super::ca::hex;

const PREFIX: &str = "hf1-";
const MAX_LEN: usize = 8192;

/// What the token's text holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    /// Names the record.
    pub(crate) id: String,
    /// Known to the token alone.
    pub(crate) secret: String,
    /// The cluster that made it.
    pub(crate) cluster_id: String,
    /// SHA-256 of the CA certificate's DER, hexadecimal.
    pub(crate) ca_fingerprint: String,
    /// Enrolment addresses of the members.
    pub(crate) addresses: Vec<String>,
}

/// What the cluster keeps of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub(crate) secret_hash: String,
    /// Seconds since 1970.
    pub(crate) expires_unix_s: u64,
    /// Who used it.
    #[serde(default)]
    pub(crate) used: Option<TokenUse>,
}

/// A used token answers the same node again (a lost answer must not burn it), and no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenUse {
    /// The id that was given.
    pub(crate) node_id: u64,
    /// The name it took.
    pub(crate) node_name: String,
    /// SHA-256 of its public key.
    pub(crate) key_hash: String,
}

impl Token {
    /// A new token with a random id and secret.
    pub(crate) fn make(
        cluster_id: String,
        ca_fingerprint: String,
        addresses: Vec<String>,
    ) -> Result<Self, getrandom::Error> {
        let (mut id, mut secret) = ([0u8; 6], [0u8; 24]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut secret)?;
        let secret = URL_SAFE_NO_PAD.encode(secret);
        Ok(Self { id: hex(&id), secret, cluster_id, ca_fingerprint, addresses })
    }

    /// As text for people to carry.
    pub(crate) fn encode(&self) -> Result<String, postcard::Error> {
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(postcard::to_stdvec(self)?)))
    }

    /// From text. The message says what is wrong with it.
    pub(crate) fn decode(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() > MAX_LEN {
            return Err("it is too long".to_owned());
        }
        let body = text.strip_prefix(PREFIX).ok_or("it does not begin with hf1-")?;
        let bytes = URL_SAFE_NO_PAD
            .decode(body)
            .map_err(|_| "it is incomplete or was changed on the way".to_owned())?;
        let token: Self = postcard::from_bytes(&bytes)
            .map_err(|_| "it is incomplete or was changed on the way".to_owned())?;
        if token.addresses.is_empty() {
            return Err("it names no address".to_owned());
        }
        Ok(token)
    }
}

impl TokenRecord {
    /// The record of a token.
    pub(crate) fn of(token: &Token, expires_unix_s: u64) -> Self {
        Self { secret_hash: hash(&token.secret), expires_unix_s, used: None }
    }

    /// Whether this is the token's secret.
    pub(crate) fn matches(&self, secret: &str) -> bool {
        // Hashes of a 192-bit random secret: comparing them in variable time tells nothing.
        self.secret_hash == hash(secret)
    }
}

fn hash(secret: &str) -> String {
    hex(digest::digest(&digest::SHA256, secret.as_bytes()).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_way_and_show_damage() -> Result<(), Box<dyn std::error::Error>> {
        let token = Token::make("c".into(), "ab".repeat(32), vec!["n1:7401".into()])?;
        let text = token.encode()?;
        assert_eq!(Token::decode(&format!("  {text}\n"))?, token);
        for bad in ["", "hf1-", "hello", &text[..text.len() - 9], &text[4..], &"hf1-A".repeat(3000)]
        {
            assert!(Token::decode(bad).is_err(), "{bad}");
        }
        let record = TokenRecord::of(&token, 1);
        assert!(record.matches(&token.secret));
        assert!(!record.matches("other"));
        Ok(())
    }
}
