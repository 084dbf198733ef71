//! Errors as values inside the extension, and their way out as Postgres errors.

use pgrx::pg_sys::errcodes::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, function_name, pg_sys};

use super::settings;

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

    /// As [`Self::notice`] from within the script of CREATE EXTENSION, which Postgres runs with
    /// `client_min_messages` at `warning`.
    pub fn notice_of_script(self) {
        // SAFETY: a GUC nest level around one report, closed right after it.
        unsafe {
            let level = pg_sys::NewGUCNestLevel();
            settings::save(c"client_min_messages", c"notice");
            self.notice();
            pg_sys::AtEOXact_GUC(true, level);
        }
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

impl From<rakam_lake::error::LakeError> for PgError {
    fn from(error: rakam_lake::error::LakeError) -> Self {
        let mut out = Self::new(error.sqlstate(), error.to_string());
        out.hint = error.hint();
        out
    }
}

impl From<rakam_files::FilesError> for PgError {
    fn from(error: rakam_files::FilesError) -> Self {
        let mut out = Self::new(error.sqlstate(), error.to_string());
        out.hint = error.hint();
        out
    }
}

impl From<rakam_sources::SourceError> for PgError {
    fn from(error: rakam_sources::SourceError) -> Self {
        let mut out = Self::new(error.sqlstate(), error.to_string());
        out.hint = error.hint();
        out
    }
}

/// The value of an argument that must not be NULL.
pub fn not_null<T>(value: Option<T>, argument: &str) -> Result<T> {
    value.ok_or_else(|| {
        let mut error = PgError::new("22004", format!("argument \"{argument}\" must not be null"));
        error.hint = instead_of_null(argument).map(Into::into);
        error
    })
}

/// What may be given for an argument that must not be NULL, where its name does not say it.
fn instead_of_null(argument: &str) -> Option<&'static str> {
    Some(match argument {
        "project" => "The view rakam.projects lists the projects that the current role can read.",
        "collection" => "The view rakam.collections lists a project's collections.",
        "properties" => "An event without properties has {}.",
        "events" => "A batch without events is [].",
        _ => return None,
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

/// A SQLSTATE as the enum that pgrx wants; one that Postgres does not know is XX000.
fn code(sqlstate: &str) -> PgSqlErrorCode {
    if sqlstate.len() != 5 {
        return PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
    }
    // Postgres packs six bits of each character, the first one lowest.
    let packed = sqlstate.bytes().rev().fold(0, |packed, byte| {
        (packed << 6) | i32::from(byte.wrapping_sub(b'0') & 0x3f)
    });
    PgSqlErrorCode::from(packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use PgSqlErrorCode as E;

    #[test]
    fn every_sqlstate_keeps_its_code() {
        for (sqlstate, expected) in [
            ("00000", E::ERRCODE_SUCCESSFUL_COMPLETION),
            ("22P02", E::ERRCODE_INVALID_TEXT_REPRESENTATION),
            ("28000", E::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
            ("40P01", E::ERRCODE_T_R_DEADLOCK_DETECTED),
            ("42501", E::ERRCODE_INSUFFICIENT_PRIVILEGE),
            ("42939", E::ERRCODE_RESERVED_NAME),
            ("53200", E::ERRCODE_OUT_OF_MEMORY),
            ("57P01", E::ERRCODE_ADMIN_SHUTDOWN),
            ("58P01", E::ERRCODE_UNDEFINED_FILE),
            ("HV00D", E::ERRCODE_FDW_INVALID_OPTION_NAME),
            ("XX001", E::ERRCODE_DATA_CORRUPTED),
            ("ZZ999", E::ERRCODE_INTERNAL_ERROR),
            ("", E::ERRCODE_INTERNAL_ERROR),
            ("42501x", E::ERRCODE_INTERNAL_ERROR),
        ] {
            assert_eq!(code(sqlstate) as isize, expected as isize, "{sqlstate}");
        }
    }
}
