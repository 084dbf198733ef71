//! The settings `rakam.*`. Each is read where it applies, at the moment it applies.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::shared;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum, pg_sys};

static MAX_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(4);
static MAX_CONSUMERS: GucSetting<i32> = GucSetting::<i32>::new(2);
static SOURCE_REFRESH: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static THREADS: GucSetting<i32> = GucSetting::<i32>::new(0);
static MEMORY_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(1024);
static ENABLE_PUSHDOWN: GucSetting<bool> = GucSetting::<bool>::new(true);
static DIGEST_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(1000);
static DIGEST_MAX_AGE: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static DIGEST_EVENTS: GucSetting<i32> = GucSetting::<i32>::new(500);
static FLUSH_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(600);
static FLUSH_MAX_AGE: GucSetting<i32> = GucSetting::<i32>::new(24 * 60 * 60);
static HOT_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1024);
static MAX_HOT_BYTES: GucSetting<f64> = GucSetting::<f64>::new(-1.0);
static FLUSH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(64);
static TARGET_FILE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256);
static MIN_FILE_EVENTS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static MAX_FILES_PER_DAY: GucSetting<i32> = GucSetting::<i32>::new(8);
static ROTATION_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(600);
static FILE_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(3 * 24 * 60 * 60);
static STORAGE_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static CACHE_DIR: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"rakam_cache"));
static CACHE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1024);
static DEDUPE_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(7 * 24 * 3600);
static DEDUPE_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(64);
static MAX_EVENT_BYTES: GucSetting<i32> = GucSetting::<i32>::new(1 << 20);
static MAX_STRING_BYTES: GucSetting<i32> = GucSetting::<i32>::new(64 << 10);
static MAX_FIELDS: GucSetting<i32> = GucSetting::<i32>::new(500);
static AUDIT: GucSetting<Audit> = GucSetting::<Audit>::new(Audit::Write);
static AUDIT_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(365 * 24 * 60);
static INVALID_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(30 * 24 * 60);
static DEAD_LETTER_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(-1);
static MAPPER_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(5000);
static SESSION_GAP: GucSetting<i32> = GucSetting::<i32>::new(30 * 60);
static GEOIP_DATABASE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static ALLOW_PROJECT_DROP: GucSetting<bool> = GucSetting::<bool>::new(false);
static ROLE_PREFIX: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"rakam_"));
static FAILPOINT: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);

/// Which calls the audit log notes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum Audit {
    #[name = c"off"]
    Off,
    #[name = c"write"]
    Write,
    #[name = c"all"]
    All,
}

pub fn init() {
    let plain = GucFlags::default();
    int(
        c"rakam.max_workers",
        c"Most task workers of rakam that run at a time in a database.",
        &MAX_WORKERS,
        1,
        64,
        GucContext::Sighup,
        plain,
    );
    int(
        c"rakam.max_consumers",
        c"Most workers of rakam that read sources at a time in a database.",
        &MAX_CONSUMERS,
        1,
        shared::CONSUMERS as i32 / 2,
        GucContext::Sighup,
        plain,
    );
    int(
        c"rakam.source_refresh",
        c"Time between two looks for new topics, partitions, shards and objects of a source.",
        &SOURCE_REFRESH,
        100,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    int(
        c"rakam.threads",
        c"Engine threads of a query; 0 is the number of processors, at most 4.",
        &THREADS,
        0,
        256,
        GucContext::Userset,
        plain,
    );
    int(c"rakam.memory_limit", c"Memory that the engine may use in the whole server (with shared_preload_libraries), else in each backend.",
        &MEMORY_LIMIT, 16, i32::MAX, GucContext::Suset, GucFlags::UNIT_MB);
    bool_guc(c"rakam.enable_pushdown", c"Evaluates filters and limits in the engine where their meaning is exactly that of Postgres.",
        &ENABLE_PUSHDOWN, GucContext::Userset, plain);
    int(
        c"rakam.digest_interval",
        c"Shortest time between two digests of the inbox.",
        &DIGEST_INTERVAL,
        10,
        60_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    int(
        c"rakam.digest_max_age",
        c"Longest time an event stays in the inbox when few arrive.",
        &DIGEST_MAX_AGE,
        10,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    int(
        c"rakam.digest_events",
        c"Events of a collection waiting in the inbox that make a digest due at once.",
        &DIGEST_EVENTS,
        1,
        i32::MAX,
        GucContext::Sighup,
        plain,
    );
    int(
        c"rakam.flush_interval",
        c"Age of the oldest chunk at which a collection with rakam.min_file_events is written to data files.",
        &FLUSH_INTERVAL,
        1,
        i32::MAX / 1000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    int(
        c"rakam.flush_max_age",
        c"Age of the oldest chunk at which a collection is written to data files however few its events.",
        &FLUSH_MAX_AGE,
        1,
        i32::MAX / 1000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    int(
        c"rakam.hot_size",
        c"Size of all chunks of a database beyond which small collections are written to data files, too.",
        &HOT_SIZE,
        1,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_float_guc(
        c"rakam.max_hot_bytes",
        c"Size of the hot tier on disk at which further events are refused; -1 is 80 % of the disk's free space.",
        c"",
        &MAX_HOT_BYTES,
        -1.0,
        9e18,
        GucContext::Sighup,
        GucFlags::UNIT_BYTE,
    );
    int(
        c"rakam.flush_size",
        c"Size of a collection's chunks at which they are written to data files.",
        &FLUSH_SIZE,
        1,
        1024,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    int(
        c"rakam.target_file_size",
        c"Size at which a data file is closed and the next one begun.",
        &TARGET_FILE_SIZE,
        1,
        1024,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    int(
        c"rakam.min_file_events",
        c"Events from which on a day or a month is worth a data file of its own.",
        &MIN_FILE_EVENTS,
        1,
        i32::MAX,
        GucContext::Sighup,
        plain,
    );
    // A day may have a file of its own, one of its month and one of its year: fewer cannot be promised.
    int(
        c"rakam.max_files_per_day",
        c"Files below half of rakam.target_file_size over any one day that compaction leaves.",
        &MAX_FILES_PER_DAY,
        3,
        1000,
        GucContext::Sighup,
        plain,
    );
    int(
        c"rakam.rotation_interval",
        c"Time after which another inbox table takes the new events.",
        &ROTATION_INTERVAL,
        1,
        i32::MAX / 1000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    int(
        c"rakam.file_retention",
        c"Time that a data file no longer in use is kept before it is deleted.",
        &FILE_RETENTION,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_string_guc(
        c"rakam.cache_dir",
        c"Directory in which blocks of objects in buckets are kept, within the data directory unless absolute; empty keeps none.",
        c"",
        &CACHE_DIR,
        GucContext::Suset,
        GucFlags::SUPERUSER_ONLY,
    );
    int(
        c"rakam.cache_size",
        c"Size that the blocks in rakam.cache_dir may take; 0 keeps none.",
        &CACHE_SIZE,
        0,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_MB,
    );
    int(
        c"rakam.storage_timeout",
        c"Time for which a call to a bucket that fails is tried again.",
        &STORAGE_TIMEOUT,
        100,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_MS,
    );
    int(
        c"rakam.dedupe_window",
        c"Time of receipt within which events with the same _id count once; 0 counts all.",
        &DEDUPE_WINDOW,
        0,
        366 * 24 * 3600,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    int(
        c"rakam.dedupe_memory",
        c"Memory in which a worker keeps filters of the event ids it remembers.",
        &DEDUPE_MEMORY,
        1,
        1 << 20,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    int(
        c"rakam.max_event_bytes",
        c"Largest event accepted.",
        &MAX_EVENT_BYTES,
        1024,
        256 << 20,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
    );
    int(
        c"rakam.max_string_bytes",
        c"Longest string kept; longer ones are cut.",
        &MAX_STRING_BYTES,
        256,
        16 << 20,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
    );
    int(
        c"rakam.max_fields",
        c"Most fields of a collection that become columns; further ones stay in _extra.",
        &MAX_FIELDS,
        1,
        1500,
        GucContext::Suset,
        plain,
    );
    GucRegistry::define_enum_guc(
        c"rakam.audit",
        c"Calls that rakam.audit_log notes: none, those that change or export something, or all.",
        c"",
        &AUDIT,
        GucContext::Suset,
        plain,
    );
    for (name, what, setting) in [
        (
            c"rakam.audit_retention",
            c"Time that entries of the audit log are kept; -1: for ever.",
            &AUDIT_RETENTION,
        ),
        (
            c"rakam.invalid_retention",
            c"Time that samples of values that did not fit are kept; -1: for ever.",
            &INVALID_RETENTION,
        ),
        (
            c"rakam.dead_letter_retention",
            c"Time that dead letters are kept; -1: until they are replayed.",
            &DEAD_LETTER_RETENTION,
        ),
    ] {
        int(
            name,
            what,
            setting,
            -1,
            i32::MAX,
            GucContext::Sighup,
            GucFlags::UNIT_MIN,
        );
    }
    int(
        c"rakam.mapper_timeout",
        c"Longest time that one call of a mapper may take; 0 is no limit of its own.",
        &MAPPER_TIMEOUT,
        0,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_MS,
    );
    int(
        c"rakam.session_gap",
        c"Pause between two events of a user that begins a session, for rakam.map_session.",
        &SESSION_GAP,
        1,
        365 * 24 * 60 * 60,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_string_guc(
        c"rakam.geoip_database",
        c"File in MaxMind's format from which rakam.map_geoip takes places.",
        c"",
        &GEOIP_DATABASE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    bool_guc(
        c"rakam.allow_project_drop",
        c"Allows rakam.drop_project, to those who may call it.",
        &ALLOW_PROJECT_DROP,
        // Who may drop projects need not be a superuser.
        GucContext::Userset,
        plain,
    );
    GucRegistry::define_string_guc(
        c"rakam.role_prefix",
        c"What the names of a project's roles begin with.",
        c"",
        &ROLE_PREFIX,
        GucContext::Suset,
        plain,
    );
    GucRegistry::define_string_guc(
        c"rakam.failpoint",
        c"Makes named points of the code fail, for tests.",
        c"",
        &FAILPOINT,
        GucContext::Suset,
        GucFlags::SUPERUSER_ONLY | GucFlags::NO_SHOW_ALL,
    );
    // A misspelt setting is an error, not one more variable that nobody reads.
    // SAFETY: NUL-terminated text, copied; on the main thread, while the library is loaded.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"rakam".as_ptr()) };
}

fn int(
    name: &'static std::ffi::CStr,
    what: &'static std::ffi::CStr,
    setting: &'static GucSetting<i32>,
    min: i32,
    max: i32,
    context: GucContext,
    flags: GucFlags,
) {
    GucRegistry::define_int_guc(name, what, c"", setting, min, max, context, flags);
}

fn bool_guc(
    name: &'static std::ffi::CStr,
    what: &'static std::ffi::CStr,
    setting: &'static GucSetting<bool>,
    context: GucContext,
    flags: GucFlags,
) {
    GucRegistry::define_bool_guc(name, what, c"", setting, context, flags);
}

pub fn max_consumers() -> usize {
    MAX_CONSUMERS.get() as usize
}

pub fn source_refresh() -> Duration {
    Duration::from_millis(SOURCE_REFRESH.get() as u64)
}

pub fn max_workers() -> usize {
    MAX_WORKERS.get() as usize
}

/// Engine threads: the setting, or what the machine has, at most four.
pub fn threads() -> usize {
    match THREADS.get() {
        0 => std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(4),
        n => n as usize,
    }
}

pub fn memory_limit_bytes() -> usize {
    (MEMORY_LIMIT.get() as usize) << 20
}

pub fn enable_pushdown() -> bool {
    ENABLE_PUSHDOWN.get()
}

pub fn digest_interval() -> Duration {
    Duration::from_millis(DIGEST_INTERVAL.get() as u64)
}

pub fn digest_max_age() -> Duration {
    Duration::from_millis(DIGEST_MAX_AGE.get() as u64)
}

pub fn digest_events() -> i64 {
    i64::from(DIGEST_EVENTS.get())
}

pub fn flush_interval() -> Duration {
    Duration::from_secs(FLUSH_INTERVAL.get() as u64)
}

pub fn flush_max_age() -> Duration {
    Duration::from_secs(FLUSH_MAX_AGE.get() as u64)
}

pub fn hot_size_bytes() -> i64 {
    i64::from(HOT_SIZE.get()) << 20
}

/// None: by the free space of the disk.
pub fn max_hot_bytes() -> Option<u64> {
    let bytes = MAX_HOT_BYTES.get();
    (bytes >= 0.0).then_some(bytes as u64)
}

pub fn flush_size_bytes() -> i64 {
    i64::from(FLUSH_SIZE.get()) << 20
}

pub fn target_file_bytes() -> usize {
    (TARGET_FILE_SIZE.get() as usize) << 20
}

pub fn min_file_events() -> u64 {
    MIN_FILE_EVENTS.get() as u64
}

pub fn max_files_per_day() -> usize {
    MAX_FILES_PER_DAY.get() as usize
}

/// `temp_file_limit` in bytes; None: there is none.
pub fn temp_file_limit_bytes() -> Option<u64> {
    // SAFETY: reads a backend variable, in kB, -1 for no limit.
    let kilobytes = unsafe { pg_sys::temp_file_limit };
    u64::try_from(kilobytes).ok().map(|kb| kb << 10)
}

pub fn rotation_interval() -> Duration {
    Duration::from_secs(ROTATION_INTERVAL.get() as u64)
}

/// How long a failing call to a bucket is repeated.
pub fn storage_timeout() -> Duration {
    Duration::from_millis(STORAGE_TIMEOUT.get() as u64)
}

pub fn file_retention() -> Duration {
    Duration::from_secs(FILE_RETENTION.get() as u64)
}

/// The directory of the block cache, relative to the data directory; None: no cache.
pub fn cache_dir() -> Option<PathBuf> {
    CACHE_DIR
        .get()
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

pub fn cache_bytes() -> u64 {
    (CACHE_SIZE.get() as u64) << 20
}

/// The window in microseconds; None: every event counts.
pub fn dedupe_window_us() -> Option<i64> {
    match i64::from(DEDUPE_WINDOW.get()) {
        0 => None,
        seconds => Some(seconds * 1_000_000),
    }
}

pub fn dedupe_memory_bytes() -> usize {
    (DEDUPE_MEMORY.get() as usize) << 20
}

pub fn max_event_bytes() -> usize {
    MAX_EVENT_BYTES.get() as usize
}

pub fn max_string_bytes() -> usize {
    MAX_STRING_BYTES.get() as usize
}

pub fn max_fields() -> usize {
    MAX_FIELDS.get() as usize
}

pub fn audit() -> Audit {
    AUDIT.get()
}

/// None: for ever.
pub fn audit_retention() -> Option<Duration> {
    age(&AUDIT_RETENTION)
}

/// None: for ever.
pub fn invalid_retention() -> Option<Duration> {
    age(&INVALID_RETENTION)
}

/// None: for ever.
pub fn dead_letter_retention() -> Option<Duration> {
    age(&DEAD_LETTER_RETENTION)
}

fn age(minutes: &GucSetting<i32>) -> Option<Duration> {
    u64::try_from(minutes.get())
        .ok()
        .map(|minutes| Duration::from_secs(minutes * 60))
}

pub fn mapper_timeout() -> Duration {
    Duration::from_millis(MAPPER_TIMEOUT.get() as u64)
}

pub fn session_gap() -> Duration {
    Duration::from_secs(SESSION_GAP.get() as u64)
}

/// Empty: none is set.
pub fn geoip_database() -> PathBuf {
    GEOIP_DATABASE
        .get()
        .map(|path| PathBuf::from(OsStr::from_bytes(path.to_bytes())))
        .unwrap_or_default()
}

pub fn allow_project_drop() -> bool {
    ALLOW_PROJECT_DROP.get()
}

pub fn role_prefix() -> String {
    ROLE_PREFIX
        .get()
        .map_or_else(|| "rakam_".to_owned(), |p| p.to_string_lossy().into_owned())
}

pub fn failpoint() -> Option<String> {
    FAILPOINT
        .get()
        .map(|text| text.to_string_lossy().into_owned())
}
