//! The networks that VMs are plugged into.

use std::collections::BTreeMap;

use crate::Name;
use crate::document::{Document, Faults};
use crate::record::NetworkRecord;
use crate::schema::table;

table! {
    /// The networks that NICs of VMs are plugged into.
    #[derive(Default)]
    pub struct NetworksDocument {
        /// Each network, as in `[networks.lan]`.
        #[serde(default)]
        networks: BTreeMap<Name, NetworkSpec>, otherwise "none",
            where "at most 1000 networks" => |networks| networks.len() <= 1000;
    }

    /// A network: a bridge of the same name on every node. A change takes effect when a VM starts.
    pub struct NetworkSpec {
        /// The bridge on every node; made where it is missing.
        bridge: String, required,
            where "an interface name: 1 to 15 letters, digits, -, _ and ." => |name| is_interface(name);
        /// The node's own interface that joins the bridge, for networks that reach beyond it.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        uplink: String, default "\"\"",
            where "an interface name: 1 to 15 letters, digits, -, _ and ." => |name| {
                name.is_empty() || is_interface(name)
            };
    }
}

impl NetworksDocument {
    /// The networks in the form that the rest of the system reads.
    #[must_use]
    pub fn records(&self) -> Vec<NetworkRecord> {
        let record = |(name, network): (&Name, &NetworkSpec)| NetworkRecord {
            name: name.clone(),
            bridge: network.bridge.clone(),
            uplink: network.uplink.clone(),
        };
        self.networks.iter().map(record).collect()
    }
}

impl Document for NetworksDocument {
    fn check_whole(&self, faults: &mut Faults) {
        for (name, network) in &self.networks {
            let other =
                self.networks.iter().take_while(|(other, _)| *other < name).find(|(_, other)| {
                    !network.uplink.is_empty()
                        && other.uplink == network.uplink
                        && other.bridge != network.bridge
                });
            let Some((other, _)) = other else { continue };
            faults.within("networks", |faults| {
                faults.within(name, |faults| {
                    faults.within("uplink", |faults| {
                        faults.add(format!(
                            "uplink `{}` already belongs to the bridge of network `{other}`: an \
                             interface joins one bridge",
                            network.uplink
                        ));
                    });
                });
            });
        }
    }
}

fn is_interface(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=15).contains(&text.len()) && text.chars().all(plain) && text != "." && text != ".."
}
