//! Waiting without ever blocking the backend: on its latch, an event file descriptor and a timeout, with
//! interrupts served.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use pgrx::pg_sys;

/// A file descriptor that other threads write to wake the backend's own thread.
#[derive(Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: a plain system call; the descriptor is owned from here on.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: fd is fresh and owned by nobody else.
        Ok(Self(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// From any thread.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live buffer to our own descriptor; a full counter wakes as well.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    fn drain(&self) {
        let mut buffer = [0u8; 8];
        // SAFETY: reads 8 bytes into a live buffer; non-blocking.
        unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    }
}

/// Waits until the waker is woken, the latch is set, or the time is over; then serves interrupts (a cancel
/// raises its error here). Backend's own thread only.
pub fn wait(waker: Option<&Waker>, timeout: Duration) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    let mut socket = pg_sys::PGINVALID_SOCKET as pg_sys::pgsocket;
    if let Some(waker) = waker {
        events |= pg_sys::WL_SOCKET_READABLE;
        socket = waker.0.as_raw_fd();
    }
    // SAFETY: waits on this process' own latch and a live descriptor.
    let fired = unsafe {
        pg_sys::WaitLatchOrSocket(
            pg_sys::MyLatch,
            events as i32,
            socket,
            // More than fits an int would end at once.
            timeout.as_millis().min(i32::MAX as u128) as std::ffi::c_long,
            pg_sys::PG_WAIT_EXTENSION,
        )
    };
    if fired & pg_sys::WL_LATCH_SET as i32 != 0 {
        // SAFETY: this process' own latch.
        unsafe { pg_sys::ResetLatch(pg_sys::MyLatch) };
    }
    if let Some(waker) = waker
        && fired & pg_sys::WL_SOCKET_READABLE as i32 != 0
    {
        waker.drain();
    }
    check_interrupts();
}

/// Serves a pending cancel or termination.
pub fn check_interrupts() {
    pgrx::check_for_interrupts!();
}

/// Sets the latch of another process of this server; nothing happens if it is gone.
pub fn set_latch_of(pid: i32) {
    // SAFETY: a PGPROC stays mapped for the life of the server; at worst the latch of its next user is set.
    unsafe {
        let process = pg_sys::BackendPidGetProc(pid);
        if !process.is_null() {
            pg_sys::SetLatch(&raw mut (*process).procLatch);
        }
    }
}

/// Asks another process of this server to end, as pg_terminate_backend does.
pub fn terminate(pid: i32) {
    // SAFETY: only a process that is in the server's own table is signalled.
    unsafe {
        if !pg_sys::BackendPidGetProc(pid).is_null() {
            libc::kill(pid, libc::SIGTERM);
        }
    }
}
