package qupath.lib.objects

class PathObject {

    Map feature
    List<Double> shift = [0.0d, 0.0d]
    boolean locked = false
    private Map<String, String> metadata = [:]

    Map<String, String> getMetadata() { metadata }

    void setLocked(boolean locked) { this.locked = locked }

}
