//! A certificate without the leader: for a node whose own is of no use to anybody. With that the
//! leader, or whoever could elect one, would not talk to it.
//!
//! A clock that was ahead for a while leaves a node with a certificate that is not good yet, and a
//! node that was off for long comes back with one that is over. The node signs with the CA's key,
//! which every member has: what is signed now was never revoked. Where it cannot, the pair before is
//! looked at.

use super::super::denied::denied;
use super::{Held, Owner};
use crate::authority;
use crate::certificates;
use crate::identity::{Life, Pair, Standing, renewal_request};
use crate::storage::Db;
use crate::tls::Credentials;

/// What a node goes on with whose certificate is of no use at this time.
pub(super) fn replacement(
    owner: &Owner<'_>,
    held: &Held,
    db: &Db,
    now_unix_s: u64,
) -> Result<Held, String> {
    let signed = match sign(owner, db, now_unix_s) {
        Ok(signed) => signed,
        Err(why) => {
            let previous = held.previous.as_ref().ok_or_else(|| why.clone())?;
            let before = usable(owner, previous, db, now_unix_s)?.ok_or(why)?;
            // Once the clock has changed again, it may be the other way round.
            return Ok(Held { previous: Some(held.pair.clone()), ..before });
        }
    };
    // What the cluster knows of was good by other clocks than this one.
    let known = certificates::is_recorded(db, &held.certificate.serial);
    let previous = if known.map_err(|error| error.to_string())? {
        Some(held.pair.clone())
    } else {
        held.previous.clone().or_else(|| Some(held.pair.clone()))
    };
    let signed = Held::of(owner.id, &signed, previous);
    signed.map_err(|why| format!("what it signed cannot be used: {why}"))
}

/// The pair before, where it is good now, and was not revoked.
fn usable(
    owner: &Owner<'_>,
    pair: &Pair,
    db: &Db,
    now_unix_s: u64,
) -> Result<Option<Held>, String> {
    let Ok(held) = Held::of(owner.id, pair, None) else { return Ok(None) };
    let good = held.certificate.standing(now_unix_s) == Standing::Good
        && Credentials::new(pair, owner.trusted).is_ok();
    let denied = denied(db).map_err(|error| error.to_string())?;
    let refused = denied.refuses(&held.certificate.holder, &held.certificate.serial);
    Ok((good && refused.is_none()).then_some(held))
}

fn sign(owner: &Owner<'_>, db: &Db, now_unix_s: u64) -> Result<Pair, String> {
    let ca = authority::own_ca(db, owner.folder, owner.cluster_id)?;
    if !owner.trusted.contains(&ca.certificate_pem) {
        return Err("its copy of the CA's key is another CA's".to_owned());
    }
    let (cluster_id, id) = (owner.cluster_id, owner.id);
    let (key, csr) = renewal_request(cluster_id, id).map_err(|error| error.to_string())?;
    let life = Life { from_unix_s: now_unix_s, lasts_s: owner.life.as_secs().max(1) };
    let signed = ca.sign_node(cluster_id, id, &csr, life).map_err(|error| error.to_string())?;
    Ok(Pair::new(&key, &signed))
}
