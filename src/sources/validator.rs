//! The options of a source's server and of the user mapping of its owner.
//!
//! Postgres does not tell a validator the TYPE of the server: what the options can only be for decides, and `create_source`
//! looks at both. What is wrong with a value is said without the value: it may be a secret.

use pgrx::pg_extern;
use rakam_sources::kafka::client as kafka;
use rakam_sources::kafka::config::KafkaConfig;
use rakam_sources::kinesis::config::KinesisConfig;

use super::service;
use crate::pg::server::{self, OptionsOf};
use crate::pg::{ErrorReport, Oid, PgError, Result, runtime, security, xact};

/// Options that only a server of TYPE 'kinesis' has.
const KINESIS: [&str; 2] = ["region", "endpoint"];
/// Options that only a user mapping for one has.
const KEYS: [&str; 3] = ["access_key_id", "secret_access_key", "session_token"];
/// Who may have the server read files of the machine.
const FILE_READERS: &str = "pg_read_server_files";

/// Checks the options of a server of a source, or of a user mapping for one. SQL: the validator of the wrapper `rakam_source`.
/// Errors: 22023 unknown, misplaced or malformed option, 42501 no right to set it, 42704 no such storage.
#[pg_extern(schema = "rakam_internal")]
fn source_validator(options: Vec<String>, catalog: Oid) -> std::result::Result<(), ErrorReport> {
    // They were checked where they come from.
    if xact::in_binary_upgrade() {
        return Ok(());
    }
    let options: Vec<(&str, &str)> = options
        .iter()
        .map(|option| option.split_once('=').unwrap_or((option, "")))
        .collect();
    Ok(match OptionsOf::catalog(catalog) {
        OptionsOf::Server => of_server(&options),
        OptionsOf::Mapping => of_mapping(&options),
        OptionsOf::Other => match options.first() {
            None => Ok(()),
            Some((name, _)) => Err(PgError::new("HV00D", format!("invalid option \"{name}\""))
                .hint("There are no valid options in this context.")),
        },
    }?)
}

fn of_server(options: &[(&str, &str)]) -> Result<()> {
    let user = security::current_user();
    if !security::is_server_admin(user) {
        return Err(
            PgError::new("42501", "permission denied to set the address of a source")
                .hint("Only superusers and members of rakam_admin may do that."),
        );
    }
    let given = |name: &str| options.iter().any(|(option, _)| *option == name);
    if given("storage") {
        return of_files(options, user);
    }
    if KINESIS.iter().any(|name| given(name)) && !given("brokers") {
        KinesisConfig::parse(options.iter().copied(), [])?;
        return Ok(());
    }
    let config = KafkaConfig::parse(options.iter().copied(), [])?;
    may_read_files(&config, user)?;
    check(config)
}

fn of_files(options: &[(&str, &str)], user: Oid) -> Result<()> {
    if let Some((name, _)) = options.iter().find(|(name, _)| *name != "storage") {
        return Err(
            PgError::new("22023", format!("unknown option \"{name}\"")).hint(
                "A server for files has the option storage; prefix, collection and format are the source's.",
            ),
        );
    }
    let storage = service::storage_of(options)?;
    // A dump has servers in the order of their names, that of a storage perhaps later: create_source asks for it.
    if !server::exists(storage) {
        service::no_storage(storage, "01000").warn();
        return Ok(());
    }
    crate::catalog::store::address(storage).map_err(|_| service::no_storage(storage, "42704"))?;
    if !server::is_usable(storage, user) {
        return Err(PgError::new(
            "42501",
            format!("permission denied for foreign server \"{storage}\""),
        ));
    }
    Ok(())
}

fn of_mapping(options: &[(&str, &str)]) -> Result<()> {
    if options.iter().any(|(name, _)| KEYS.contains(name)) {
        KinesisConfig::parse([("region", "any")], options.iter().copied())?;
        return Ok(());
    }
    let config = KafkaConfig::parse([("brokers", "any")], options.iter().copied())?;
    may_read_files(&config, security::current_user())?;
    check(config)
}

fn may_read_files(config: &KafkaConfig, user: Oid) -> Result<()> {
    let files = config.file_options();
    let Some(option) = files.first() else {
        return Ok(());
    };
    let role = security::role_named(FILE_READERS);
    if security::is_superuser(user)
        || role.is_some_and(|role| security::has_privileges_of(user, role))
    {
        return Ok(());
    }
    Err(
        PgError::new("42501", format!("permission denied to set option \"{option}\"")).hint(
            format!("It names a file of the server: only roles with the privileges of \"{FILE_READERS}\" may set it."),
        ),
    )
}

/// Asks librdkafka whether it knows the options. No broker is asked.
fn check(config: KafkaConfig) -> Result<()> {
    runtime::wait_for(async move {
        // Clients have threads of their own, which inherit the mask of signals of the thread that makes them.
        tokio::task::spawn_blocking(move || kafka::check(&config))
            .await
            .map_err(|error| rakam_sources::SourceError::Misuse(error.to_string()))?
    })??;
    Ok(())
}
