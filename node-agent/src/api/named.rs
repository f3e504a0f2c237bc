//! Names under which clients repeat their transactions (`TxnRequest.client`).
//!
//! A name counts among those of the same caller alone: nobody is answered with what another's
//! transaction came to, a node's for one. And a caller has only so many at a time: the store
//! remembers a limited number of names, and forgets those that were silent for longest.

use std::collections::BTreeMap;

use tokio::time::{Duration, Instant};
use tonic::Status;

/// Names of a caller at a time.
const NAMES_MAX: usize = 64;
/// A name that was silent so long is none any more.
const SILENT: Duration = Duration::from_secs(600);
/// Longest name, bytes.
const LENGTH_MAX: usize = 48;
/// Callers that are remembered. One that is forgotten begins anew.
const CALLERS_MAX: usize = 1024;

/// The names that each caller has used of late.
#[derive(Debug, Default)]
pub struct Named(BTreeMap<String, BTreeMap<String, Instant>>);

impl Named {
    /// The store's name for what a caller (`client/ann`, say) names so.
    ///
    /// # Errors
    /// It is too long, or the caller has too many.
    pub fn bind(&mut self, caller: &str, name: &str, now: Instant) -> Result<String, Status> {
        if name.len() > LENGTH_MAX {
            let text =
                format!("`client` has at most {LENGTH_MAX} bytes, this one has {}", name.len());
            return Err(Status::invalid_argument(text));
        }
        if !self.0.contains_key(caller) {
            self.make_room();
        }
        let names = self.0.entry(caller.to_owned()).or_default();
        if !names.contains_key(name) && names.len() >= NAMES_MAX {
            names.retain(|_, last| now.saturating_duration_since(*last) < SILENT);
            if names.len() >= NAMES_MAX {
                return Err(Status::resource_exhausted(format!(
                    "`{caller}` has given its transactions {NAMES_MAX} names (`client`) of late, as many as it may: a program keeps one for as long as it runs"
                )));
            }
        }
        names.insert(name.to_owned(), now);
        Ok(format!("{caller}/{name}"))
    }

    fn make_room(&mut self) {
        if self.0.len() < CALLERS_MAX {
            return;
        }
        let silent = self.0.iter().min_by_key(|(_, names)| names.values().max().copied());
        if let Some(caller) = silent.map(|(caller, _)| caller.clone()) {
            self.0.remove(&caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_callers_alone() {
        let (mut named, now) = (Named::default(), Instant::now());
        let of_ann = named.bind("client/ann", "node-1-00ff", now).unwrap();
        assert_ne!(of_ann, "node-1-00ff");
        assert_ne!(of_ann, named.bind("client/bob", "node-1-00ff", now).unwrap());
        assert_eq!(of_ann, named.bind("client/ann", "node-1-00ff", now).unwrap());
        // No name reaches out of its caller's: a client's has no slash in it.
        assert!(named.bind("client/ann", "../bob/x", now).unwrap().starts_with("client/ann/"));
        let long = named.bind("client/ann", &"x".repeat(LENGTH_MAX + 1), now).unwrap_err();
        assert_eq!(long.code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn a_caller_has_so_many_names_at_a_time_and_the_others_have_theirs() {
        let (mut named, now) = (Named::default(), Instant::now());
        let mut bind = |caller: &str, name: usize, now| named.bind(caller, &name.to_string(), now);
        for name in 0..NAMES_MAX {
            bind("client/greedy", name, now).unwrap();
        }
        let refused = bind("client/greedy", NAMES_MAX, now).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
        bind("client/greedy", 0, now).unwrap();
        bind("client/modest", 0, now).unwrap();
        bind("client/greedy", NAMES_MAX, now + SILENT).unwrap();
        for caller in 0..5000 {
            bind(&format!("client/{caller}"), 0, now + SILENT).unwrap();
        }
        assert!(named.0.len() <= CALLERS_MAX);
    }
}
