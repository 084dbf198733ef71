//! Sources as users define them: servers and what they may say, the functions that create, stop and move sources, and how a
//! source's service is reached. Consumers, which read them, are workers (`workers::consumer`).

pub mod functions;
pub mod seek;
pub mod service;
pub mod validator;
