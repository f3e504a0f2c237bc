//! Bridges by netlink: made where missing, brought up, and given their uplink.

use std::path::Path;

use rtnetlink::{Handle, LinkBridge, LinkUnspec, new_connection};

use super::{NetworkError, check_name};

/// Makes sure that a bridge is there and up, and that `uplink` (if not empty) belongs to it.
/// Doing it again changes nothing.
///
/// # Errors
/// [`NetworkError`].
pub async fn ensure_bridge(bridge: &str, uplink: &str) -> Result<(), NetworkError> {
    check_name(bridge)?;
    let (connection, handle, _) =
        new_connection().map_err(NetworkError::io("opening netlink for", bridge))?;
    let driver = tokio::spawn(connection);
    let done = ensure(&handle, bridge, uplink).await;
    driver.abort();
    done
}

async fn ensure(handle: &Handle, bridge: &str, uplink: &str) -> Result<(), NetworkError> {
    if !interface(bridge).exists() {
        let message = LinkBridge::new(bridge).build();
        let made = handle.link().add(message).execute().await;
        // Another start may have made it in between: what counts is that it is there.
        if !interface(bridge).exists() {
            made.map_err(NetworkError::netlink("making bridge", bridge))?;
        }
    }
    if !interface(bridge).join("bridge").exists() {
        return Err(NetworkError::NotABridge(bridge.to_owned()));
    }
    let up = LinkUnspec::new_with_name(bridge).up().build();
    let raised = handle.link().set(up).execute().await;
    raised.map_err(NetworkError::netlink("bringing up", bridge))?;
    if uplink.is_empty() { Ok(()) } else { enslave(handle, bridge, uplink).await }
}

async fn enslave(handle: &Handle, bridge: &str, uplink: &str) -> Result<(), NetworkError> {
    check_name(uplink)?;
    if !interface(uplink).exists() {
        return Err(NetworkError::NoUplink(uplink.to_owned()));
    }
    match std::fs::read_link(interface(uplink).join("master")) {
        Ok(master) if master.file_name().is_some_and(|name| name == bridge) => return Ok(()),
        Ok(_) => {
            let (uplink, bridge) = (uplink.to_owned(), bridge.to_owned());
            return Err(NetworkError::UplinkTaken { uplink, bridge });
        }
        Err(_) => {}
    }
    let index = nix::net::if_::if_nametoindex(bridge)
        .map_err(|errno| NetworkError::io("finding", bridge)(errno.into()))?;
    let message = LinkUnspec::new_with_name(uplink).controller(index).up().build();
    let set = handle.link().set(message).execute().await;
    set.map_err(NetworkError::netlink("enslaving uplink", uplink))
}

fn interface(name: &str) -> std::path::PathBuf {
    Path::new("/sys/class/net").join(name)
}
