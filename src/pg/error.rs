//! Errors as values inside the extension, and their way out as Postgres errors.

use pgrx::pg_sys::errcodes::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, function_name};

/// What a client sees of an error: SQLSTATE, message, detail, hint in the wording of Postgres.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgError {
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

pub type Result<T> = std::result::Result<T, PgError>;

impl PgError {
    pub fn new(sqlstate: &str, message: impl Into<String>) -> Self {
        Self {
            sqlstate: sqlstate.to_owned(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A broken invariant of ours: XX000.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new("XX000", message)
    }

    /// The one answer for a project that is unknown or not the caller's: it must not tell which.
    pub fn no_project(project: &str) -> Self {
        Self::new(
            "42501",
            format!("permission denied for project \"{project}\""),
        )
        .hint("The project must exist, and the current role needs membership in one of its roles.")
    }

    fn report(self) -> ErrorReport {
        let mut report = ErrorReport::new(code(&self.sqlstate), self.message, function_name!());
        if let Some(detail) = self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint {
            report = report.set_hint(hint);
        }
        report
    }

    /// Leaves through Postgres' error handling. Backend's own thread only.
    pub fn raise(self) -> ! {
        self.report().report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }

    /// Written to the server log (and to the client, as its settings say), and goes on.
    pub fn warn(self) {
        self.report().report(PgLogLevel::WARNING);
    }

    /// Sent to the client as a NOTICE.
    pub fn notice(self) {
        self.report().report(PgLogLevel::NOTICE);
    }

    /// Written to the server log only.
    pub fn log(self) {
        self.report().report(PgLogLevel::LOG);
    }
}

impl std::fmt::Display for PgError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<rakam_event::error::EventError> for PgError {
    fn from(error: rakam_event::error::EventError) -> Self {
        let mut out = Self::new(error.sqlstate(), error.to_string());
        out.hint = error.hint().map(Into::into);
        out
    }
}

/// The value of an argument that must not be NULL.
pub fn not_null<T>(value: Option<T>, argument: &str) -> Result<T> {
    value.ok_or_else(|| {
        PgError::new(
            "22004",
            format!("argument \"{argument}\" must not be null"),
        )
    })
}

/// `?` in a `#[pg_extern]` function that returns `Result<_, ErrorReport>` keeps SQLSTATE, detail and hint.
impl From<PgError> for ErrorReport {
    fn from(error: PgError) -> Self {
        error.report()
    }
}

/// The value, or the error raised.
pub trait OrRaise<T> {
    fn or_raise(self) -> T;
}

impl<T> OrRaise<T> for Result<T> {
    fn or_raise(self) -> T {
        match self {
            Ok(value) => value,
            Err(error) => error.raise(),
        }
    }
}

/// The SQLSTATEs that rakam raises (SPEC §20), as the enum that pgrx wants.
fn code(sqlstate: &str) -> PgSqlErrorCode {
    use PgSqlErrorCode as E;
    match sqlstate {
        "08000" => E::ERRCODE_CONNECTION_EXCEPTION,
        "0A000" => E::ERRCODE_FEATURE_NOT_SUPPORTED,
        "01000" => E::ERRCODE_WARNING,
        "00000" => E::ERRCODE_SUCCESSFUL_COMPLETION,
        "22003" => E::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
        "22004" => E::ERRCODE_NULL_VALUE_NOT_ALLOWED,
        "22007" => E::ERRCODE_INVALID_DATETIME_FORMAT,
        "22008" => E::ERRCODE_DATETIME_FIELD_OVERFLOW,
        "22021" => E::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
        "22023" => E::ERRCODE_INVALID_PARAMETER_VALUE,
        "22P02" => E::ERRCODE_INVALID_TEXT_REPRESENTATION,
        "22P05" => E::ERRCODE_UNTRANSLATABLE_CHARACTER,
        "25006" => E::ERRCODE_READ_ONLY_SQL_TRANSACTION,
        "28000" => E::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
        "40001" => E::ERRCODE_T_R_SERIALIZATION_FAILURE,
        "42501" => E::ERRCODE_INSUFFICIENT_PRIVILEGE,
        "42602" => E::ERRCODE_INVALID_NAME,
        "42703" => E::ERRCODE_UNDEFINED_COLUMN,
        "42704" => E::ERRCODE_UNDEFINED_OBJECT,
        "42710" => E::ERRCODE_DUPLICATE_OBJECT,
        "42804" => E::ERRCODE_DATATYPE_MISMATCH,
        "42809" => E::ERRCODE_WRONG_OBJECT_TYPE,
        "42939" => E::ERRCODE_RESERVED_NAME,
        "53000" => E::ERRCODE_INSUFFICIENT_RESOURCES,
        "53100" => E::ERRCODE_DISK_FULL,
        "53200" => E::ERRCODE_OUT_OF_MEMORY,
        "53400" => E::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
        "54000" => E::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        "55000" => E::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "55P03" => E::ERRCODE_LOCK_NOT_AVAILABLE,
        "57014" => E::ERRCODE_QUERY_CANCELED,
        "58030" => E::ERRCODE_IO_ERROR,
        "58P01" => E::ERRCODE_UNDEFINED_FILE,
        "HV000" => E::ERRCODE_FDW_ERROR,
        "HV00D" => E::ERRCODE_FDW_INVALID_OPTION_NAME,
        "HV00J" => E::ERRCODE_FDW_OPTION_NAME_NOT_FOUND,
        _ => E::ERRCODE_INTERNAL_ERROR,
    }
}
