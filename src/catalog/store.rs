//! Storages as their servers and user mappings define them at this moment, opened once in a process.

use std::cell::RefCell;
use std::collections::HashMap;

use rakam_lake::storage::place::Place;
use rakam_lake::storage::{Credentials, Storage, StorageConfig, StorageOptions, StorageUrl};

use super::manifest::StorageRow;
use crate::pg::runtime::Runtime;
use crate::pg::server::{self, Options};
use crate::pg::{PgError, Result, guc};

/// The wrapper whose servers are storages.
const WRAPPER: &str = "rakam";

/// A storage in use by this process.
struct Opened {
    config: StorageConfig,
    /// The engine threads to which its connections belong.
    runtime: u64,
    storage: Storage,
}

thread_local! {
    static OPENED: RefCell<HashMap<String, Opened>> = RefCell::new(HashMap::new());
}

impl StorageRow {
    /// Whether it is the default storage, which is a table.
    pub fn is_local(&self) -> bool {
        self.kind == "local"
    }

    /// Whether it is the default storage, or its foreign server is there.
    pub fn is_defined(&self) -> bool {
        self.is_local()
            || server::named(&self.name, WRAPPER)
                .is_some_and(|server| server.options.iter().any(|(name, _)| name == "url"))
    }

    /// Where the storage is and how it is entered, as of now; None for the default storage.
    pub fn config(&self) -> Result<Option<StorageConfig>> {
        if self.is_local() {
            return Ok(None);
        }
        Ok(Some(config(&self.name)?.1))
    }

    /// The storage, with the connections that this process has to it already; None for the default storage. Touches
    /// neither disk nor network.
    pub fn open(&self) -> Result<Option<Storage>> {
        let Some(config) = self.config()? else {
            return Ok(None);
        };
        open(&self.name, config).map(Some)
    }
}

/// The storage of a foreign server, whether a project uses it or not, with its address. As [`StorageRow::open`].
pub fn server(name: &str) -> Result<(String, Storage)> {
    let (address, config) = config(name)?;
    Ok((address, open(name, config)?))
}

/// The address of a storage server, as its option has it.
pub fn address(name: &str) -> Result<String> {
    config(name).map(|(address, _)| address)
}

/// Where the storage of a foreign server is, however its options say it.
pub fn place(name: &str) -> Result<Place> {
    config(name).map(|(_, config)| Place::of(&config))
}

fn config(name: &str) -> Result<(String, StorageConfig)> {
    let undefined = |what: &str| {
        PgError::new("58030", format!("storage \"{name}\" has no {what}"))
            .hint("Its foreign server must exist and have the option url.")
    };
    let server = server::named(name, WRAPPER).ok_or_else(|| undefined("foreign server"))?;
    let options = pairs(&server.options);
    let address = options.iter().find(|(name, _)| *name == "url");
    let (_, address) = address.ok_or_else(|| undefined("url"))?;
    let url = StorageUrl::parse(address)?;
    let config = StorageConfig {
        options: StorageOptions::parse(&url, &options)?,
        credentials: Credentials::parse(&pairs(&server.mapping))?,
        timeout: guc::storage_timeout(),
        url,
    };
    Ok(((*address).to_owned(), config))
}

fn open(name: &str, config: StorageConfig) -> Result<Storage> {
    let runtime = Runtime::current()?.number();
    let known = OPENED.with_borrow(|opened| {
        opened
            .get(name)
            .filter(|o| o.runtime == runtime && o.config == config)
            .map(|o| o.storage.clone())
    });
    if let Some(storage) = known {
        return Ok(storage);
    }
    let storage = Storage::open(&config)?;
    let opened = Opened {
        config,
        runtime,
        storage: storage.clone(),
    };
    OPENED.with_borrow_mut(|all| all.insert(name.to_owned(), opened));
    Ok(storage)
}

fn pairs(options: &Options) -> Vec<(&str, &str)> {
    options
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}
