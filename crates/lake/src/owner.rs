//! Whose a storage is: the object `_rakam/owner.json`, and the mark of its writer that each data file's name carries.
//!
//! A database may delete from a storage only while the object names it, with the nonce that it wrote last. Everything by
//! which a copy of a database differs is compared: a restored dump is another installation, a copy made by
//! `CREATE DATABASE … TEMPLATE` another database, a promoted copy or a restored backup another timeline, and a copy of
//! the disk knows an older nonce as soon as the original has renewed it.

use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;
use uuid::Uuid;

use crate::error::LakeError;

/// Below it lies what rakam keeps about the storage itself: no data files, and nothing that is ever an orphan.
pub const SYSTEM_PREFIX: &str = "_rakam/";
pub const OWNER_PATH: &str = "_rakam/owner.json";

const WHAT: &str = "owner object of the storage";
/// Writers that an owner object names at most, the newest ones.
const WRITERS_MAX: usize = 1_000;

/// Which database this is. Copies differ in at least one of the parts, but for copies of the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Given by CREATE EXTENSION.
    pub installation: String,
    /// The server's, in decimal: JSON numbers are not exact enough for all readers.
    pub system_identifier: String,
    pub timeline: u32,
    pub database_oid: u32,
}

/// The mark of a writer in the names of its objects: 32 bits, which stand for an [`Identity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Writer(u32);

impl Identity {
    pub fn writer(&self) -> Writer {
        let text = format!(
            "{} {} {} {}",
            self.installation, self.system_identifier, self.timeline, self.database_oid
        );
        Writer(XxHash64::oneshot(0, text.as_bytes()) as u32)
    }
}

impl std::fmt::Display for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl std::str::FromStr for Writer {
    type Err = LakeError;

    fn from_str(text: &str) -> Result<Self, LakeError> {
        u32::from_str_radix(text, 16)
            .map(Self)
            .map_err(|_| LakeError::corrupt(WHAT, "a writer is no hexadecimal number"))
    }
}

/// A new name for an object: a UUIDv7 whose last 32 bits are the writer's mark.
pub fn object_id(writer: Writer) -> Uuid {
    let mut bytes = Uuid::now_v7().into_bytes();
    bytes[12..].copy_from_slice(&writer.0.to_be_bytes());
    Uuid::from_bytes(bytes)
}

/// Whether an object is one of those that rakam keeps about a storage: about this one, or one whose address lies below it.
pub fn is_system(path: &str) -> bool {
    let of_another = |(at, _): (usize, &str)| {
        let rest = &path[at + 1..];
        rest == OWNER_PATH || SYSTEM_FOLDERS.iter().any(|folder| rest.starts_with(folder))
    };
    path.starts_with(SYSTEM_PREFIX) || path.match_indices("/_rakam/").any(of_another)
}

/// What tells the folder of another storage from a collection of this name.
const SYSTEM_FOLDERS: [&str; 2] = ["_rakam/description/", "_rakam/probe-"];

/// The name under which a data file is known, wherever it lies: that of the object, also of what an interrupted write left
/// of it. None: the name is none of ours.
pub fn file_name_of(path: &str) -> Option<&str> {
    writer_of(path)?;
    path.rsplit('/').next()?.get(..FILE_NAME_BYTES)
}

/// The length of such a name: an id and `.parquet`.
pub const FILE_NAME_BYTES: usize = 44;

/// Whether a file is of a kind that people load or attach, and rakam never stores events in.
pub fn is_table(path: &str) -> bool {
    let path = path
        .strip_suffix(".gz")
        .or(path.strip_suffix(".zst"))
        .unwrap_or(path);
    [".csv", ".tsv", ".json", ".ndjson", ".jsonl", ".avro"]
        .iter()
        .any(|suffix| path.ends_with(suffix))
}

/// Who wrote the object of this path, remains of an interrupted write included; None: the name is none of ours.
pub fn writer_of(path: &str) -> Option<Writer> {
    let name = path.rsplit('/').next()?;
    let id: Uuid = name.get(..36)?.parse().ok()?;
    if id.get_version_num() != 7 || !name[36..].starts_with(".parquet") {
        return None;
    }
    let [.., a, b, c, d] = id.into_bytes();
    Some(Writer(u32::from_be_bytes([a, b, c, d])))
}

/// The content of the owner object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub format: u32,
    #[serde(flatten)]
    pub identity: Identity,
    /// The database's name when this was written.
    pub database: String,
    /// Counts adoptions.
    pub epoch: u64,
    /// New with each write.
    pub nonce: String,
    /// Marks of all who wrote objects that are the owner's now, the newest last.
    pub writers: Vec<String>,
}

impl Owner {
    pub fn new(
        identity: &Identity,
        database: &str,
        epoch: u64,
        nonce: &str,
        writers: &[String],
    ) -> Self {
        let mut writers = writers.to_vec();
        let own = identity.writer().to_string();
        writers.retain(|writer| *writer != own);
        writers.push(own);
        let beyond = writers.len().saturating_sub(WRITERS_MAX);
        writers.drain(..beyond);
        Self {
            format: 1,
            identity: identity.clone(),
            database: database.to_owned(),
            epoch,
            nonce: nonce.to_owned(),
            writers,
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, LakeError> {
        serde_json::to_vec_pretty(self).map_err(|e| LakeError::Encode {
            what: WHAT,
            reason: e.to_string(),
        })
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, LakeError> {
        let owner: Self =
            serde_json::from_slice(bytes).map_err(|e| LakeError::corrupt(WHAT, e.to_string()))?;
        match owner.format {
            1 => Ok(owner),
            other => Err(LakeError::corrupt(WHAT, format!("unknown format {other}"))),
        }
    }

    /// Why the storage is not this database's, in words; None: it is. `nonces`: those that it wrote last.
    pub fn difference(&self, us: &Identity, nonces: &[String]) -> Option<&'static str> {
        let owner = &self.identity;
        if owner.installation != us.installation {
            Some("another installation of rakam")
        } else if owner.system_identifier != us.system_identifier {
            Some("the same database in another server")
        } else if owner.database_oid != us.database_oid {
            Some("another copy of the database in the same server")
        } else if owner.timeline < us.timeline {
            Some("the database before this server was promoted or restored")
        } else if owner.timeline > us.timeline {
            Some("a promoted or restored copy of this server")
        } else if !nonces.contains(&self.nonce) {
            Some("a copy of this server")
        } else {
            None
        }
    }

    /// The owner in a few words, for people.
    pub fn describe(&self) -> String {
        format!(
            "database \"{}\" of server {}, timeline {}",
            self.database, self.identity.system_identifier, self.identity.timeline
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            installation: Uuid::nil().to_string(),
            system_identifier: u64::MAX.to_string(),
            timeline: 1,
            database_oid: 5,
        }
    }

    #[test]
    fn an_owner_comes_back_as_it_was_written() {
        let owner = Owner::new(&identity(), "app \"x\"", 3, "n1", &["0000000a".to_owned()]);
        let own = identity().writer().to_string();
        assert_eq!(owner.writers, ["0000000a".to_owned(), own]);
        assert_eq!(Owner::decode(&owner.encode().unwrap()).unwrap(), owner);
        assert_eq!(
            Owner::new(&identity(), "app", 3, "n2", &owner.writers).writers,
            owner.writers
        );
        for broken in ["", "{}", "null", "{\"format\":2}"] {
            assert_eq!(
                Owner::decode(broken.as_bytes()).unwrap_err().sqlstate(),
                "XX001"
            );
        }
        let mut other = owner;
        other.format = 2;
        assert!(Owner::decode(&other.encode().unwrap()).is_err());
    }

    #[test]
    fn every_kind_of_copy_is_told_apart() {
        let nonces = ["n1".to_owned(), "n2".to_owned()];
        let owner = Owner::new(&identity(), "app", 1, "n2", &[]);
        assert_eq!(owner.difference(&identity(), &nonces), None);
        let of = |us: Identity| owner.difference(&us, &nonces).unwrap_or("nobody");
        let restored = Identity {
            installation: Uuid::max().to_string(),
            ..identity()
        };
        assert!(of(restored).contains("installation"));
        let upgraded = Identity {
            system_identifier: "1".to_owned(),
            ..identity()
        };
        assert!(of(upgraded).contains("another server"));
        let template = Identity {
            database_oid: 6,
            ..identity()
        };
        assert!(of(template).contains("same server"));
        let promoted = Identity {
            timeline: 2,
            ..identity()
        };
        assert!(of(promoted).contains("before this server was promoted"));
        let old = Identity {
            timeline: 0,
            ..identity()
        };
        assert!(of(old).contains("promoted or restored copy"));
        assert!(owner.difference(&identity(), &nonces[..1]).is_some());
    }

    #[test]
    fn what_is_kept_about_storages_is_told_apart() {
        for path in [
            "_rakam/anything",
            "_rakam/owner.json",
            "sub/_rakam/owner.json",
            "a/b/_rakam/description/x",
            "_rakam_/_rakam/probe-1",
        ] {
            assert!(is_system(path), "{path}");
        }
        for path in [
            "a/_rakam/2026/x.parquet",
            "a_rakam/owner.json",
            "a/_rakam",
            "a",
        ] {
            assert!(!is_system(path), "{path}");
        }
    }

    #[test]
    fn names_tell_their_writer() {
        let writer = identity().writer();
        assert_eq!(writer.to_string().parse::<Writer>().unwrap(), writer);
        assert!("x".parse::<Writer>().is_err());
        let id = object_id(writer);
        assert_eq!(id.get_version_num(), 7);
        for path in [
            format!("p/c/2024/{id}.parquet"),
            format!("{id}.parquet"),
            format!("p/{id}.parquet.{}.tmp", Uuid::now_v7()),
        ] {
            assert_eq!(writer_of(&path), Some(writer), "{path}");
            assert_eq!(file_name_of(&path), Some(format!("{id}.parquet").as_str()));
        }
        for path in [
            "",
            "p/x.parquet",
            "p/",
            "ü",
            &format!("p/{}.parquet", Uuid::new_v4()),
            &format!("p/{id}.csv"),
            &format!("p/x{id}.parquet"),
            &format!("{id}.parquet/x"),
        ] {
            assert_eq!(writer_of(path), None, "{path}");
            assert_eq!(file_name_of(path), None);
        }
        let other = Identity {
            timeline: 2,
            ..identity()
        };
        assert_ne!(other.writer(), writer);
        assert_ne!(object_id(writer), object_id(writer));
    }
}
