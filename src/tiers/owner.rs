//! The fence around a storage: who may delete from it. The rules are in `rakam_lake::owner`.
//!
//! The owner object is only ever changed by a conditional put, by one session after the other, and the nonce about to be
//! written is noted here before, so that an answer that got lost, or a crash in between, leaves no doubt. Whatever is not
//! certain deletes nothing: reads and uploads go on, `rakam.health` and `rakam.stat_lake` say so, and [`adopt`] ends it.

use rakam_lake::owner::{OWNER_PATH, Owner};
use uuid::Uuid;

use crate::catalog::storages::{self, Fence};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, failpoint};
use crate::tiers::object::{PutIf, Remote, Version};

/// The owner object is written anew before a deletion if it is older than this: a copy of the disk knows an older one.
const RENEW_S: f64 = 60.0;

type Outcome<T> = std::result::Result<T, Failure>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// To know.
    Look,
    /// To own what nobody owns yet.
    Claim,
    /// To delete.
    Delete,
    /// To own it whoever owned it.
    Adopt,
}

/// Before an object is written: a storage that nobody owns becomes this database's. One request, once.
pub fn claim(remote: &Remote) -> Outcome<()> {
    let fence = xact::worker(|| storages::fence(remote.storage_id))?;
    if fence.is_new() {
        settle(remote, Wish::Claim)?;
    }
    Ok(())
}

/// Whether this database may delete from the storage, asked now.
pub fn may_delete(remote: &Remote) -> Outcome<bool> {
    settle(remote, Wish::Delete)
}

/// Sees whether the storage is there and whose it is, and notes both.
pub fn look(remote: &Remote) -> Outcome<bool> {
    settle(remote, Wish::Look)
}

/// Makes the storage this database's.
pub fn adopt(remote: &Remote) -> Outcome<()> {
    if settle(remote, Wish::Adopt)? {
        return xact::worker(|| storages::restamp_deferred(remote.storage_id));
    }
    let fence = xact::worker(|| storages::fence(remote.storage_id))?;
    let name = &remote.name;
    Err(Failure::Error(if fence.standing == "unfenced" {
        PgError::new("0A000", format!("storage \"{name}\" cannot be adopted"))
            .detail(
                "Its store has no conditional writes, without which nobody can own it for certain.",
            )
            .hint("Reads and uploads go on; remove what is no longer used by means of the store.")
    } else {
        PgError::new(
            "40001",
            format!("storage \"{name}\" was adopted by somebody else at the same moment"),
        )
        .hint("See rakam.stat_lake for its owner, and call it again if it is to be this database.")
    }))
}

/// What is to be written, over which version.
struct Next {
    over: Option<Version>,
    epoch: u64,
    writers: Vec<String>,
}

/// True: the storage is this database's.
fn settle(remote: &Remote, wish: Wish) -> Outcome<bool> {
    let id = remote.storage_id;
    let _alone = SessionLock::take(LockOn::Owner(id));
    let (identity, database) = xact::worker(storages::identity)?;
    let fence = xact::worker(|| storages::fence(id))?;
    let found = remote.get_versioned(OWNER_PATH)?;
    let next = match found {
        None if wish == Wish::Adopt || fence.is_claimable() => {
            if wish == Wish::Look {
                return Ok(false);
            }
            Next {
                over: None,
                epoch: fence.epoch as u64 + 1,
                writers: fence.writers.clone(),
            }
        }
        // Without conditional writes there never was one.
        None if fence.nonce.is_none()
            && (fence.standing == "unfenced"
                || fence.standing == "new" && !remote.writes_conditionally()?) =>
        {
            return unfenced(id);
        }
        None => return foreign(id, "nobody: its owner object is gone"),
        Some((bytes, version)) => match Owner::decode(&bytes) {
            Ok(owner) => match owner.difference(&identity, &fence.nonces()) {
                None => {
                    if wish == Wish::Look || fence.is_fresh(&owner) {
                        return ours(id, &fence, &owner);
                    }
                    Next {
                        over: Some(version),
                        epoch: owner.epoch + u64::from(wish == Wish::Adopt),
                        writers: owner.writers,
                    }
                }
                Some(_) if wish == Wish::Adopt => Next {
                    over: Some(version),
                    epoch: owner.epoch.max(fence.epoch as u64) + 1,
                    writers: joined(&owner.writers, &fence.writers),
                },
                Some(reason) => {
                    return foreign(id, &format!("{reason}: {}", owner.describe()));
                }
            },
            Err(_) if wish == Wish::Adopt => Next {
                over: Some(version),
                epoch: fence.epoch as u64 + 1,
                writers: fence.writers.clone(),
            },
            Err(_) => return foreign(id, "unknown: its owner object cannot be read"),
        },
    };
    // Some stores take a condition and ignore it: asked once, before the first time that something depends on it.
    if (!fence.is_ours || wish == Wish::Adopt) && !remote.writes_conditionally()? {
        return unfenced(id);
    }
    let nonce = Uuid::new_v4().to_string();
    let owner = Owner::new(&identity, &database, next.epoch, &nonce, &next.writers);
    let bytes = owner.encode()?;
    xact::worker(|| {
        storages::intend(id, &nonce)?;
        // A nonce that is written must be known after any crash.
        xact::durable();
        Ok(())
    })?;
    failpoint::hit("owner.before_put");
    let put = remote.put_if(OWNER_PATH, &bytes, next.over.as_ref())?;
    failpoint::hit("owner.after_put");
    match put {
        PutIf::Written => {}
        PutIf::Unsupported => return unfenced(id),
        PutIf::Conflict => {
            let now = remote.get_versioned(OWNER_PATH)?;
            let owner = now.and_then(|(bytes, _)| Owner::decode(&bytes).ok());
            let fence = xact::worker(|| storages::fence(id))?;
            if let Some(owner) = &owner
                && owner.difference(&identity, &fence.nonces()).is_none()
            {
                // The write of a session that was killed arrived in between.
                return ours(id, &fence, owner);
            }
            let who = owner.map_or_else(|| "unknown".to_owned(), |owner| owner.describe());
            return foreign(id, &format!("somebody who was faster: {who}"));
        }
    }
    xact::worker(|| {
        storages::owned(id, &nonce, owner.epoch as i64, &owner.writers)?;
        xact::durable();
        Ok(())
    })?;
    Ok(true)
}

/// It names this database; notes it if that was not known.
fn ours(id: i32, fence: &Fence, owner: &Owner) -> Outcome<bool> {
    if !fence.is_ours || fence.nonce.as_ref() != Some(&owner.nonce) {
        xact::worker(|| storages::owned(id, &owner.nonce, owner.epoch as i64, &owner.writers))?;
    }
    Ok(true)
}

fn unfenced(id: i32) -> Outcome<bool> {
    let why = "unknown: the store has no conditional writes";
    xact::worker(|| storages::not_owned(id, "unfenced", why))?;
    Ok(false)
}

fn foreign(id: i32, who: &str) -> Outcome<bool> {
    xact::worker(|| storages::not_owned(id, "foreign", who))?;
    Ok(false)
}

fn joined(first: &[String], second: &[String]) -> Vec<String> {
    let mut all = first.to_vec();
    all.extend(second.iter().filter(|w| !first.contains(w)).cloned());
    all
}

impl Fence {
    /// Nobody has asked yet whose it is.
    fn is_new(&self) -> bool {
        self.nonce.is_none() && self.standing == "new"
    }

    /// This database never owned it and has no files in it: without an owner it may take it.
    fn is_claimable(&self) -> bool {
        self.nonce.is_none() && !self.has_files
    }

    /// It was written by us a moment ago.
    fn is_fresh(&self, owner: &Owner) -> bool {
        self.is_ours
            && self.nonce.as_ref() == Some(&owner.nonce)
            // Of the future: the clock was set back, and nobody knows by how much.
            && self.age_s.is_some_and(|age| (0.0..RENEW_S).contains(&age))
    }
}
