//! Keys: made from the operating system's randomness, kept as SHA-256 only.

use rand::TryRng;
use rand::rngs::SysRng;

use crate::catalog::projects::{self as catalog, KeyKind};
use crate::pg::{PgError, Result};

/// Bytes of randomness in a key; with so many a plain hash is as good as a slow one.
const KEY_BYTES: usize = 32;

/// One key set in clear: shown to its creator, then forgotten.
pub struct KeySet {
    pub id: pgrx::Uuid,
    pub read: String,
    pub write: String,
    pub master: String,
}

/// Makes a key set and stores its hashes.
pub fn create(project_id: i32) -> Result<KeySet> {
    let key_id = uuid::Uuid::new_v4();
    let new = |kind| -> Result<String> {
        let key = random(kind)?;
        catalog::insert_key(key_id, kind, project_id, &catalog::key_hash(&key))?;
        Ok(key)
    };
    Ok(KeySet {
        id: pgrx::Uuid::from_bytes(*key_id.as_bytes()),
        read: new(KeyKind::Read)?,
        write: new(KeyKind::Write)?,
        master: new(KeyKind::Master)?,
    })
}

fn random(kind: KeyKind) -> Result<String> {
    let mut bytes = [0u8; KEY_BYTES];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|e| PgError::internal(format!("could not get random bytes: {e}")))?;
    let prefix = match kind {
        KeyKind::Read => "rk_r_",
        KeyKind::Write => "rk_w_",
        KeyKind::Master => "rk_m_",
    };
    Ok(bytes.iter().fold(prefix.to_owned(), |mut key, byte| {
        key.push(hex_digit(byte >> 4));
        key.push(hex_digit(byte & 15));
        key
    }))
}

fn hex_digit(value: u8) -> char {
    char::from(b"0123456789abcdef"[usize::from(value)])
}
